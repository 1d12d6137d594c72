"""Chooses the next token from logits.

The rules are those of transformers' logits processors, in their order (penalty, temperature, top-k, top-p,
min-p), applied to the most probable tokens only: sorting a vocabulary of 50,000 for every token takes as long
as computing the token.
"""

from collections.abc import Sequence

import torch

from kvchat.contract import Sampling
from kvchat.errors import KvchatError

CANDIDATES = 256
"""Tokens that are looked at first; all of them only where these don't suffice."""


class NotANumberError(KvchatError):
    """The model computed NaN: neither its logits nor what it cached meanwhile can be used."""


class Sampler:
    """One turn's choices; two samplers with the same seed choose alike from the same logits."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self.reads_context = sampling.repeat_penalty != 1.0
        """Whether `choose` needs the ids so far; gathering them costs time that grows with the context."""
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor, context: Sequence[int]) -> int:
        """The next id from logits `[1, vocabulary]`; `context` may be empty unless `reads_context`.

        Raises:
            NotANumberError: a logit is NaN.
        """
        scores = logits[0].float().cpu()
        if scores.max().isnan():  # the maximum of numbers and NaN is NaN
            raise NotANumberError(
                "The model computed values that are no numbers, so there is no answer. "
                "Try another --precision, or another model."
            )
        if self.reads_context and context:
            scores = penalised(scores, context, self._sampling.repeat_penalty)
        if self._sampling.temperature <= 0:
            return int(scores.argmax())
        ids, weights = candidates(scores / self._sampling.temperature, self._sampling)
        return int(ids[torch.multinomial(weights, 1, generator=self._generator)])


def penalised(scores: torch.Tensor, context: Sequence[int], penalty: float) -> torch.Tensor:
    """Scores `[vocabulary]` with those of ids in `context` made smaller (CTRL, arXiv 1909.05858)."""
    seen = torch.tensor(sorted(set(context)))
    found = scores[seen]
    return scores.index_put((seen,), torch.where(found < 0, found * penalty, found / penalty))


def candidates(scores: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) of the tokens that may be drawn from scores `[vocabulary]`, the most probable first.

    top-k keeps so many; top-p (arXiv 1904.09751) the smallest set that has so much of the probability; min-p
    (arXiv 2407.01082) those that have such a part of the most probable one's.
    """
    vocabulary = scores.shape[0]
    if not sampling.top_k and sampling.top_p >= 1 and not sampling.min_p:
        return torch.arange(vocabulary), scores.softmax(-1)
    for width in (min(sampling.top_k or CANDIDATES, vocabulary), vocabulary):
        best, ids = scores.topk(width)
        weights = (best - (best if sampling.top_k else scores).logsumexp(-1)).exp()
        kept = weights.cumsum(-1) - weights < sampling.top_p if sampling.top_p < 1 else weights >= 0
        kept &= weights >= sampling.min_p * weights[0]
        kept[0] = True
        if sampling.top_k or not kept[-1]:
            break
    return ids[kept], weights[kept]
