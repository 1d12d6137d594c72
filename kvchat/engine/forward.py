"""Runs tokens through the model: with a KV cache, or reading everything again each time.

Both ways have one face, `read(ids) → logits`, so that the decode loop is the same loop and the difference
that the user feels is the cache and nothing else. A stop is looked at between layers: one uncached token at
4,096 tokens takes seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kvchat.cache.kv import ConversationKV


class Stopped(Exception):  # noqa: N818 - a wish of the user, not an error
    """The user stopped the turn; everything that was committed stays."""


class Reader(Protocol):
    """Reads tokens and answers with logits."""

    evaluated: int
    """Tokens run through the model so far."""

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """Reads `ids` after everything read before; logits `[1, vocabulary]` after the last of them."""
        ...


class CachedReader:
    """Reads each token once and keeps its keys and values."""

    def __init__(self, model: PreTrainedModel, kv: ConversationKV) -> None:
        self._model = model
        self._kv = kv
        self.evaluated = 0

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """One forward pass over the new ids; commits them in every layer, or in none."""
        positions = range(len(self._kv), len(self._kv) + len(ids))
        with self._kv.append(ids) as cache:
            logits = _forward(self._model, ids, positions, past_key_values=cache, use_cache=True)
        self.evaluated += len(ids)
        return logits


class UncachedReader:
    """Keeps token ids only, and reads all of them again for every new one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self.evaluated = 0

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """One forward pass over all ids so far and the new ones."""
        self._ids.extend(ids)
        logits = _forward(self._model, self._ids, range(len(self._ids)), use_cache=False)
        self.evaluated += len(self._ids)
        return logits


@contextmanager
def stopping_between_layers(model: PreTrainedModel, stopped: Callable[[], bool]) -> Iterator[None]:
    """Inside the block, a forward pass raises `Stopped` before the next layer once `stopped()` says so."""

    def check(*_: object) -> None:
        if stopped():
            raise Stopped

    # every decoder layer in transformers is one of these; what the list of them is called differs
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    hooks = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _forward(model: PreTrainedModel, ids: Sequence[int], positions: range, **options: object) -> torch.Tensor:
    """Logits `[1, vocabulary]` of the last position; positions are explicit, never guessed from the cache."""
    output = model(
        input_ids=torch.tensor([list(ids)], device=model.device),
        position_ids=torch.tensor([list(positions)], device=model.device),
        logits_to_keep=1,
        **options,
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits
