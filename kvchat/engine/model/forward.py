"""Runs tokens through the model, with a KV cache or without one.

Both implement `read(ids) → logits`, so the decode loop is the same and only the cache makes the difference.
Stops are checked between layers, because one uncached token at 4,096 tokens takes seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import torch
from transformers.cache_utils import Cache

from kvchat.cache.kv_cache import ConversationKV

if TYPE_CHECKING:  # takes a second to import, and a compiled step does not need it
    from transformers import PreTrainedModel


class Stopped(Exception):  # noqa: N818 - requested by the user, not an error
    """The user stopped the turn; committed tokens stay in the cache."""


class Reader(Protocol):
    """Reads tokens and returns logits."""

    evaluated: int
    """Tokens run through the model so far."""

    def read(self, ids: Sequence[int], keep: int = 1) -> torch.Tensor:
        """Reads `ids` after everything read before; logits `[keep, vocabulary]` after the last of them."""
        ...


class CachedReader:
    """Reads each token once; keys and values are stored in the cache."""

    def __init__(self, model: "PreTrainedModel", kv: ConversationKV) -> None:
        self._model = model
        self._kv = kv
        self.evaluated = 0

    def read(self, ids: Sequence[int], keep: int = 1) -> torch.Tensor:
        """One forward pass over the new ids; commits them in every layer, or in none.

        One pass and one commit per id where the model continues its state exactly in no other way.
        """
        if self._kv.by_steps and len(ids) > 1:
            return torch.cat([self.read([token]) for token in ids][-keep:])
        first = self._kv.index.next_position  # after an eviction that left a gap, more than the rows
        with self._kv.append(ids) as past:
            logits = forward_pass(self._model, ids, range(first, first + len(ids)), past, keep)
        self.evaluated += len(ids)
        return logits


class UncachedReader:
    """Stores only token ids, and reads all of them again for every new one."""

    def __init__(self, read_all: Callable[[Sequence[int]], torch.Tensor], evaluated: int = 0) -> None:
        """`read_all` reads ids from an empty context; logits `[1, vocabulary]`."""
        self._read_all = read_all
        self._ids: list[int] = []
        self.evaluated = evaluated

    @classmethod
    def of_model(cls, model: "PreTrainedModel", evaluated: int = 0) -> Self:
        """By one forward pass of the model."""
        return cls(lambda ids: forward_pass(model, ids, range(len(ids)), None), evaluated)

    def read(self, ids: Sequence[int], keep: int = 1) -> torch.Tensor:
        """Reads all ids so far and the new ones.

        Raises:
            ValueError: `keep` is not 1.
        """
        if keep != 1:
            raise ValueError("without a cache there are no drafts to verify")
        self._ids.extend(ids)
        logits = self._read_all(self._ids)
        self.evaluated += len(self._ids)
        return logits


@contextmanager
def stopping_between_layers(model: "PreTrainedModel", stopped: Callable[[], bool]) -> Iterator[None]:
    """Inside the block, a forward pass raises `Stopped` before the next layer once `stopped()` says so."""

    from transformers.modeling_layers import GradientCheckpointingLayer

    def check(*_: object) -> None:
        if stopped():
            raise Stopped

    # every decoder layer in transformers has this type; the name of the list of layers differs
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    hooks = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Parameters(NamedTuple):
    """The signature of a model's `forward`."""

    cache: str
    """Name of the cache parameter; recurrent models call it `cache_params`."""
    positions: bool
    """Whether it takes positions: recurrent models have none, ALiBi computes distances from the mask."""


@cache
def parameters_of(kind: "type[PreTrainedModel]") -> Parameters:
    """Inspects the signature, once per class."""
    names = signature(kind.forward).parameters
    past = "past_key_values" if "past_key_values" in names else "cache_params"
    return Parameters(past, "position_ids" in names)


@torch.inference_mode()
def forward_pass(
    model: "PreTrainedModel", ids: Sequence[int], positions: Sequence[int], past: Cache | None, keep: int = 1
) -> torch.Tensor:
    """Logits `[keep, vocabulary]` of the last `keep` ids; positions are always passed explicitly."""
    parameters = parameters_of(type(model))  # type: ignore[arg-type] # classes are hashable
    options: dict[str, object] = {"use_cache": past is not None}
    if past is not None:
        options[parameters.cache] = past
    if parameters.positions:
        options["position_ids"] = torch.tensor([list(positions)], device=model.device)
    output = model(
        input_ids=torch.tensor([list(ids)], device=model.device),
        logits_to_keep=keep,
        **options,
    )
    logits: torch.Tensor = output.logits[0, -keep:]
    return logits
