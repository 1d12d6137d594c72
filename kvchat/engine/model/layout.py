"""What a model's cache looks like: which layers keep keys and values, which a state, and where that ends.

`measure` finds it out. It knows layers; it refuses to know models, so that it costs no import of any.
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
    """What there is to know about a model before it reads a conversation."""

    kinds: tuple[str, ...]
    """Per layer, in transformers' words; `dummy` keeps nothing."""
    heads: tuple[HeadShape | None, ...]
    """Per layer; None where it keeps no keys and values."""
    states: tuple[StateShape | None, ...]
    """Per layer; None where it keeps no state."""
    position_limit: int
    """Positions the model was made for; `NO_LIMIT` where it has none."""
    positions: str
    """`rotary`, `learned`, `alibi`, or `none`."""
    rotary: str
    """The layout of `Rotation`; `other` also where layers differ."""
    rotary_frequencies: tuple[float, ...]
    """The same rotation in every layer with keys; empty where one rule doesn't turn them all."""
    is_croppable: bool
    """Whether every layer can be taken back token by token; known after a first forward pass only."""
    gap_refusal: str
    """Why policies that leave a gap can't be used; empty where they can."""
    experts: bool
    notes: tuple[str, ...]
    """What is special about this model's cache, in sentences."""

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values over all layers, as the heads really are."""
        return sum(head.numbers for head in self.heads if head) * dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of all states, however long the conversation: of the live ones, and of every mark."""
        return sum(state.bytes for state in self.states if state)

    @property
    def rotary_dims(self) -> int:
        """Numbers of a head that are turned, where one rule turns all layers; else 0."""
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
        return DummyLayer()  # type: ignore[return-value] # a Cache takes it all the same
    if kind in RECURRENT:
        return RecurrentLayer(state or StateShape())
    if kind in HYBRID:
        return HybridLayer(head, stored_as, state or StateShape())
    if kv in QUANTISED_BITS:
        from kvchat.cache.quantized_layer import QuantizedLayer

        return QuantizedLayer(QUANTISED_BITS[kv], head, dtype)
    return DenseLayer(head, stored_as)
