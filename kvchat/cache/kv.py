"""The tensors of a KV cache: one growable layer per attention layer, and the token ids they belong to.

For every layer the model stores keys and values of shape `[1, kv_heads, tokens, head_dim]`. Here each lives
in one preallocated buffer `[1, kv_heads, capacity, head_dim]`, so that appending a token writes one row and
cropping changes one integer; a cache that is concatenated instead copies itself for every token.

Worked example, SmolLM2-135M in bf16: 30 layers, 3 KV heads, head dim 64. One token costs
2 × 30 × 3 × 64 × 2 bytes = 23,040 bytes; 1,000 tokens, rounded up to a capacity of 1,024, hold 23.6 MB.

It knows ids, lengths and bytes. It refuses to know text, templates, and which conversation it serves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH_STEP = 256
"""Tokens by which a layer grows. Copying 94 MB takes about 13 ms, so growth costs about 0.05 ms a token."""


class GrowableLayer(CacheLayerMixin):
    """Keys and values of one layer, `[1, kv_heads, capacity, head_dim]` each; `length` tokens are filled."""

    is_croppable = True
    is_sliding = False
    """Even for layers with a sliding window: everything is kept and the mask hides what is out of sight, so
    that a crop never needs a key that was thrown away."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit before the layer has to grow."""
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def storage_bytes(self) -> int:
        """Bytes held, growth slack included."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    @property
    def used_bytes(self) -> int:
        """Bytes of the `length` tokens that are filled."""
        if self.keys is None or self.values is None:
            return 0
        per_token = sum(t[:, :, 0].numel() * t.element_size() for t in (self.keys, self.values))
        return per_token * self.length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: dtype, device and head shapes come with the first states."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states `[1, kv_heads, new, head_dim]`; returns views of all `length` tokens so far."""
        start, end = self.length, self.length + key_states.shape[-2]
        self.keys = self._with_room(self.keys, key_states, end)
        self.values = self._with_room(self.values, value_states, end)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        self.is_initialized = True
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _with_room(self, buffer: torch.Tensor | None, states: torch.Tensor, tokens: int) -> torch.Tensor:
        """`buffer` if `tokens` fit into it, else a larger one with the same content."""
        if buffer is not None and buffer.shape[-2] >= tokens:
            return buffer
        capacity = -(-tokens // GROWTH_STEP) * GROWTH_STEP
        larger = states.new_empty((*states.shape[:2], capacity, states.shape[-1]))
        if buffer is not None:
            larger[:, :, : self.length] = buffer[:, :, : self.length]
        return larger

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens; the buffer stays.

        Raises:
            ValueError: `length` is negative or more than is stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"can't keep {length} of {self.length} tokens")
        self.length = length

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' spelling of `truncate`: a negative number of tokens to remove."""
        self.truncate(max(0, self.length - abs(tokens_to_remove)))

    def reset(self) -> None:
        """Empties the layer and frees its memory."""
        self.keys = self.values = None
        self.is_initialized = False
        self.length = 0

    def get_seq_length(self) -> int:
        """Tokens stored: also the offset of the next query."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys the next update returns, index of the first of them); asked before that update."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: grows as long as there is memory."""
        return -1


class ConversationKV:
    """One conversation's cache: its token ids, and for each of them a key and a value in every layer.

    The ids are the truth. Between calls of `append` every layer holds exactly `len(ids)` tokens; a forward
    pass that is stopped or fails half-way leaves layers of different lengths, and `append` takes all of them
    back to the last commit.
    """

    def __init__(self, layers: int) -> None:
        self._ids: list[int] = []
        self.layers = [GrowableLayer() for _ in range(layers)]
        self.cache = Cache(layers=[*self.layers])
        """What the model is handed as `past_key_values`."""

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """The committed token ids."""
        return tuple(self._ids)

    @property
    def storage_bytes(self) -> int:
        """Bytes held by all layers, growth slack included."""
        return sum(layer.storage_bytes for layer in self.layers)

    @property
    def used_bytes(self) -> int:
        """2 × layers × KV heads × head dim × bytes of a number × tokens."""
        return sum(layer.used_bytes for layer in self.layers)

    @contextmanager
    def append(self, ids: Sequence[int]) -> Iterator[Cache]:
        """Commits `ids` if the forward pass inside the block fills every layer; else nothing happened."""
        try:
            yield self.cache
            self._commit(ids)
        finally:
            self.truncate(len(self._ids))

    def _commit(self, ids: Sequence[int]) -> None:
        expected = len(self._ids) + len(ids)
        if any(layer.length != expected for layer in self.layers):
            lengths = sorted({layer.length for layer in self.layers})
            raise RuntimeError(f"layers hold {lengths} tokens instead of {expected}")
        self._ids.extend(ids)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens in every layer."""
        for layer in self.layers:
            layer.truncate(length)
        del self._ids[length:]

    def clear(self) -> None:
        """Forgets every token and frees the memory."""
        self._ids.clear()
        for layer in self.layers:
            layer.reset()
