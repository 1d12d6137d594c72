"""The layout of a model's cache: which layers store keys and values, which a state, and the position limit.

`probe.measure` determines it. Must not import transformers' models, which takes a second.
"""

import sys
from dataclasses import dataclass

import torch
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import HeadShape
from kvchat.cache.state_layer import HybridLayer, RecurrentLayer, StateLayer, StateShape
from kvchat.engine.model.dtypes import QUANTISED_BITS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_LIMIT = sys.maxsize

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
RECURRENT = {"linear_attention", "conv"}
HYBRID = {"hybrid", "hybrid_sliding"}
NOTHING = "dummy"
WINDOWED = {"sliding_attention", "chunked_attention", "hybrid_sliding"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The measured shape of a model and of its cache."""

    kinds: tuple[str, ...]
    """Per layer, transformers' name of its type; `dummy` stores nothing."""
    heads: tuple[HeadShape | None, ...]
    """Per layer; None where it stores no keys and values."""
    states: tuple[StateShape | None, ...]
    """Per layer; None where it has no state."""
    windows: tuple[int, ...]
    """Per layer: how many tokens back a query attends to, or tokens of a chunk; 0 where it attends to all."""
    position_limit: int
    """Positions that the model supports; `NO_LIMIT` where there is no limit."""
    positions: str
    """`rotary`, `learned`, `alibi`, or `none`."""
    rotary: str
    """The layout of `Rotation`; `other` also where layers differ."""
    rotary_frequencies: tuple[float, ...]
    """The rotation of every layer's keys; empty where layers differ."""
    is_croppable: bool
    """Whether every layer can be cropped to any length; known after a first forward pass only."""
    gap_refusal: str
    """Why policies that leave a gap can't be used; empty where they can."""
    experts: bool
    notes: tuple[str, ...]
    """Special properties of this model's cache, in sentences."""

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(head.numbers for head in self.heads if head) * dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of all states, for any length of conversation; every checkpoint takes as much again."""
        return sum(state.bytes for state in self.states if state)

    @property
    def rotary_dims(self) -> int:
        """Rotated numbers of a head, where all layers have the same rotation; else 0."""
        return 2 * len(self.rotary_frequencies)


def new_layers(shape: ModelShape, kv: str, dtype: torch.dtype) -> list[CacheLayerMixin | StateLayer]:
    """Fresh layers for one conversation.

    Args:
        kv: `auto` (as the model computes), `fp32`, `bf16`, `int8` or `int4`. Hybrid layers are not quantised.
        dtype: of the states that the model computes.
    """
    described = zip(shape.kinds, shape.heads, shape.states, strict=True)
    return [new_layer(kind, head, state, kv, dtype) for kind, head, state in described]


def new_kv(shape: ModelShape, kv: str, dtype: torch.dtype) -> ConversationKV:
    """An empty cache for one conversation; the arguments are those of `new_layers`."""
    return ConversationKV(new_layers(shape, kv, dtype))


def new_layer(
    kind: str, head: HeadShape | None, state: StateShape | None, kv: str, dtype: torch.dtype
) -> CacheLayerMixin | StateLayer:
    """A fresh layer of one kind; the arguments are those of `new_layers`."""
    stored_as = DTYPES.get(kv, dtype)
    if kind == NOTHING:
        return DummyLayer()  # type: ignore[return-value] # a Cache accepts it
    if kind in RECURRENT:
        return RecurrentLayer(state or StateShape())
    if kind in HYBRID:
        return HybridLayer(head, stored_as, state or StateShape())
    if kv in QUANTISED_BITS:
        from kvchat.cache.quantized_layer import QuantizedLayer

        return QuantizedLayer(QUANTISED_BITS[kv], head, dtype)
    return DenseLayer(head, stored_as)
