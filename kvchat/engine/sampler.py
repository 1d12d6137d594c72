"""Chooses the next token from logits.

The same rules in the same order as transformers' logits processors (penalty, temperature, top-k, top-p,
min-p), applied to the most probable tokens only: sorting a vocabulary of 50,000 takes as long as decoding
a token.
"""

from collections.abc import Sequence

import torch

from kvchat.contract import Sampling
from kvchat.errors import KvchatError

CANDIDATES = 256
"""Most probable tokens that are sorted first; the whole vocabulary only where these aren't enough."""


class NotANumberError(KvchatError):
    """The model computed NaN: its logits and the keys and values of that pass can't be used."""


class Sampler:
    """Samples the tokens of one turn; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self.reads_context = sampling.repeat_penalty != 1.0
        """Whether `choose` needs the ids so far; collecting them takes time that grows with the context."""
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
        if scores.max().isnan():  # the maximum is NaN if any score is
            raise NotANumberError(
                "The model computed NaN (not a number), so there is no answer. "
                "Try another --precision, or another model."
            )
        if self.reads_context and context:
            scores = penalised(scores, context, self._sampling.repeat_penalty)
        if self._sampling.temperature <= 0:
            return int(scores.argmax())
        ids, weights = candidates(scores / self._sampling.temperature, self._sampling)
        return int(ids[torch.multinomial(weights, 1, generator=self._generator)])


def penalised(scores: torch.Tensor, context: Sequence[int], penalty: float) -> torch.Tensor:
    """Scores `[vocabulary]`, lowered for ids in `context` (CTRL, arXiv 1909.05858)."""
    seen = torch.tensor(sorted(set(context)))
    found = scores[seen]
    return scores.index_put((seen,), torch.where(found < 0, found * penalty, found / penalty))


def candidates(scores: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) of the tokens to sample from, for scores `[vocabulary]`; the most probable first.

    top-k keeps the k most probable; top-p (arXiv 1904.09751) the smallest set with total probability p; min-p
    (arXiv 2407.01082) those with at least that share of the highest probability.
    """
    vocabulary = scores.shape[0]
    if not sampling.top_k and sampling.top_p >= 1 and not sampling.min_p:
        return torch.arange(vocabulary), scores.softmax(-1)
    for width in (min(sampling.top_k or CANDIDATES, vocabulary), vocabulary):
        best, ids = scores.topk(width)
        weights = (best - (best if sampling.top_k else scores).logsumexp(-1)).exp()
        chosen = weights.cumsum(-1) - weights < sampling.top_p if sampling.top_p < 1 else weights >= 0
        chosen &= weights >= sampling.min_p * weights[0]
        chosen[0] = True
        if sampling.top_k or not chosen[-1]:
            break
    return ids[chosen], weights[chosen]
