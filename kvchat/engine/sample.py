"""Chooses the next token from logits, through transformers' own logits processors."""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvchat.contract import Sampling


class Sampler:
    """One turn's choices; two samplers with the same seed choose alike from the same logits."""

    def __init__(self, sampling: Sampling) -> None:
        self._greedy = sampling.temperature <= 0
        self.reads_context = sampling.repeat_penalty != 1.0
        """Whether `choose` needs the ids so far; gathering them costs time that grows with the context."""
        self._processors = _processors(sampling)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor, context: Sequence[int]) -> int:
        """The next id from logits `[1, vocabulary]`; `context` may be empty unless `reads_context`."""
        seen = torch.LongTensor([list(context)])
        scores = self._processors(seen, logits.float().cpu())
        if self._greedy:
            return int(scores.argmax(dim=-1))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))


def _processors(sampling: Sampling) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.repeat_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repeat_penalty))
    if sampling.temperature <= 0:
        return processors
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors
