"""Keys and values of one attention layer as the model computed them, unquantised.

Must not depend on token ids.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Self
from weakref import WeakSet

import torch

from kvchat.cache.layer import AddressedLayer, Growth, HeadShape, Memory, bytes_of, rounded_up


class _Addresses(NamedTuple):
    """The addresses of a pair of tensors; computed once, and asked for every token."""

    keys: torch.Tensor
    values: torch.Tensor
    memory: Memory
    storages: dict[int, int]


class DenseLayer(AddressedLayer):
    """Keys and values `[1, kv_heads, capacity, head_dim]` each, of which `length` tokens are filled.

    The buffers are preallocated: appending a token writes one row, and cropping changes one integer.
    """

    def __init__(self, shape: HeadShape | None = None, dtype: torch.dtype | None = None) -> None:
        """`shape` is needed to compute bytes before the first token; `dtype` None is that of the states."""
        super().__init__()
        self.head_shape = shape
        self.stored_dtype = dtype
        self._sharers: WeakSet[DenseLayer] = WeakSet([self])
        """The layers that use the same memory, this one included."""
        self._addresses: _Addresses | None = None

    @property
    def capacity(self) -> int:
        """Tokens that fit before the layer has to grow."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def storages(self) -> dict[int, int]:
        return {} if self.keys is None else self._located().storages

    @property
    def used_bytes(self) -> int:
        return self._bytes_per_token() * self.length

    def bytes_at(self, length: int) -> int:
        return self._bytes_per_token() * rounded_up(length)

    def growth(self, tokens: int) -> Growth:
        end = self.length + tokens
        if self.capacity >= end and not self._overwrites_shared(self.length):
            return Growth()
        return Growth(self.bytes_at(end), self.storage_bytes if len(self._sharers) == 1 else 0)

    def _bytes_per_token(self) -> int:
        tensors = [t for t in (self.keys, self.values) if t is not None]
        if not tensors and self.head_shape and self.stored_dtype:
            return self.head_shape.numbers * self.stored_dtype.itemsize
        return sum(t[:, :, 0].numel() * t.element_size() for t in tensors)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states `[1, kv_heads, new, head_dim]`; returns all `length` tokens in their dtype."""
        start, end = self.length, self.length + key_states.shape[-2]
        if self.capacity < end or self._overwrites_shared(start):
            self._reallocate(key_states, value_states, rounded_up(end))
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        self.is_initialized = True
        keys, values = self.read()
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def reserve(self, tokens: int) -> None:
        end = self.length + tokens
        if self.keys is None or self.values is None:
            if self.head_shape is None or self.stored_dtype is None:
                raise ValueError("a layer without a known shape can't be allocated before its first token")
            heads, key_dim, value_dim = self.head_shape
            self.keys = torch.empty(1, heads, rounded_up(end), key_dim, dtype=self.stored_dtype)
            self.values = torch.empty(1, heads, rounded_up(end), value_dim, dtype=self.stored_dtype)
            self.is_initialized = True
            self._detach()
        elif self.capacity < end or self._overwrites_shared(self.length):
            self._reallocate(self.keys, self.values, rounded_up(end))

    def memory(self) -> Memory:
        return self._located().memory

    def _located(self) -> _Addresses:
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        known = self._addresses
        if known is None or known.keys is not keys or known.values is not values:
            storages = bytes_of((keys, values))
            known = self._addresses = _Addresses(keys, values, _memory_of(keys, values), storages)
        return known

    def advance(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise ValueError(f"{tokens} tokens after {self.length} don't fit a capacity of {self.capacity}")
        self.length += tokens

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _overwrites_shared(self, start: int) -> bool:
        """Whether writing from row `start` on would change another layer's rows."""
        return len(self._sharers) > 1 and any(o.length > start for o in self._sharers if o is not self)

    def _reallocate(self, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int) -> None:
        """Copies the rows into new memory for `capacity` tokens."""
        self.keys = self._copy(self.keys, key_states, capacity)
        self.values = self._copy(self.values, value_states, capacity)
        self._detach()

    def _copy(self, buffer: torch.Tensor | None, states: torch.Tensor, capacity: int) -> torch.Tensor:
        shape = (*states.shape[:2], capacity, states.shape[-1])
        copy = states.new_empty(shape, dtype=self.stored_dtype or states.dtype)
        if buffer is not None:
            copy[:, :, : self.length] = buffer[:, :, : self.length]
        return copy

    def _detach(self) -> None:
        """Stops sharing memory."""
        self._addresses = None  # it references the old tensors
        self._sharers.discard(self)
        self._sharers = WeakSet([self])

    def truncate(self, length: int) -> None:
        self.check_length(length)
        self.length = length

    def select(self, rows: torch.Tensor) -> None:
        if self.keys is None or self.values is None:
            return
        keys, values = self.keys[:, :, rows], self.values[:, :, rows]
        self.length = len(rows)
        self.keys = self._copy(keys, keys, rounded_up(self.length))
        self.values = self._copy(values, values, rounded_up(self.length))
        self._detach()

    def fork(self) -> Self:
        other = type(self)(self.head_shape, self.stored_dtype)
        other.keys, other.values, other.length = self.keys, self.values, self.length
        other.is_initialized = self.is_initialized
        other._sharers = self._sharers
        self._sharers.add(other)
        return other

    def unshare(self, tokens: int) -> int:
        if self.keys is None or self.values is None or not self._overwrites_shared(self.length):
            return 0
        self._reallocate(self.keys, self.values, rounded_up(self.length + tokens))
        return self.used_bytes

    def change_keys(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces the filled keys `[1, kv_heads, length, head_dim]` by others of that shape."""
        if self.keys is None or self.values is None:
            return
        if len(self._sharers) > 1:
            self._reallocate(self.keys, self.values, self.capacity)
        self.keys[:, :, : self.length] = change(self.keys[:, :, : self.length])

    def pack(self, start: int) -> dict[str, torch.Tensor]:
        if self.keys is None or self.values is None:
            return {}
        rows = slice(start, self.length)
        # cloned even where a slice is contiguous: a thread writes it to disk during the next turn
        return {"keys": self.keys[0, :, rows].clone(), "values": self.values[0, :, rows].clone()}

    def unpack(self, start: int, parts: Mapping[str, torch.Tensor]) -> None:
        self.truncate(start)
        if parts and parts["keys"].shape[1]:
            self.update(parts["keys"][None], parts["values"][None])

    def reset(self) -> None:
        """Empties the layer and frees its memory."""
        self.keys = self.values = None
        self.is_initialized = False
        self.length = 0
        self._detach()


def _memory_of(keys: torch.Tensor, values: torch.Tensor) -> Memory:
    """Of `[1, kv_heads, capacity, head_dim]` each, all rows unquantised."""
    return Memory(
        width=keys.element_size(),
        first=0,
        room=keys.shape[2],
        bits=0,
        slots=0,
        starts=0,
        heads=keys.shape[1],
        key_dim=keys.shape[3],
        value_dim=values.shape[3],
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        key_head_step=keys.stride(1),
        value_head_step=values.stride(1),
        key_row_step=keys.stride(2),
        value_row_step=values.stride(2),
    )
