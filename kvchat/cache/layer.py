"""Where one attention layer keeps its keys and values.

`StoredLayer` is what every way of storing them has in common; `GrowableLayer` stores them as they are, and
`quantize` stores them in fewer bits. A layer knows lengths, shapes and bytes; it refuses to know token ids.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Self
from weakref import WeakSet

import torch
from transformers.cache_utils import CacheLayerMixin

GROWTH_STEP = 256
"""Tokens by which a layer grows. Copying 94 MB takes about 13 ms, so growth costs about 0.05 ms a token."""


class HeadShape(NamedTuple):
    """What one token of one layer is made of: a key and a value for each KV head."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """Numbers of one token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class Growth(NamedTuple):
    """Bytes that an update allocates, and bytes it lets go of once it has copied them."""

    allocated: int = 0
    freed: int = 0


def rounded_up(tokens: int) -> int:
    """`tokens`, up to the next growth step."""
    return -(-tokens // GROWTH_STEP) * GROWTH_STEP


class StoredLayer(CacheLayerMixin):
    """Keys and values of one layer for `length` tokens, however they are stored.

    Satisfies transformers' cache layer interface. Everything is kept even where the model's window is
    narrower: the mask hides what is out of sight, so that a crop never needs a key that was thrown away.
    """

    is_croppable = True
    is_sliding = False
    block: int = 1
    """Tokens that can be dropped from the middle only together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    @abstractmethod
    def storages(self) -> dict[int, int]:
        """Address → bytes of every piece of memory held, growth slack included. Forks may hold the same."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of the `length` tokens that are filled."""

    @abstractmethod
    def bytes_at(self, length: int) -> int:
        """Bytes that a layer of `length` tokens holds, growth slack included."""

    @abstractmethod
    def growth(self, tokens: int) -> Growth:
        """What an `update` with so many tokens does to the memory held now."""

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer that is not empty, `[1, kv_heads, length, head_dim]` each."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens; O(1), the memory stays.

        Raises:
            ValueError: `length` is negative or more than is stored.
        """

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Keeps those rows (ascending int64 indices), moved together, in memory of their own.

        Rows are kept or dropped in whole blocks.
        """

    @abstractmethod
    def fork(self) -> Self:
        """A layer with the same content that shares this one's memory until one writes over the other."""

    def unshare(self, tokens: int) -> int:
        """Leaves a fork's memory where appending so many tokens would write over it; returns bytes copied.

        An `update` does the same by itself: asked before, it can be timed and told.
        """
        return 0

    @abstractmethod
    def pack(self, start: int) -> dict[str, torch.Tensor]:
        """Contiguous copies of what is stored from token `start` on; `start` comes from `pack_start`."""

    @abstractmethod
    def unpack(self, start: int, parts: Mapping[str, torch.Tensor]) -> None:
        """Keeps the first `start` tokens and puts what `pack(start)` gave after them, bit for bit.

        Raises:
            ValueError: the parts don't fit this layer.
        """

    def pack_start(self, length: int) -> int:
        """The largest token at most `length` from which `pack` can start."""
        return length

    def block_edges(self) -> list[int]:
        """Rows at which something begins that `select` keeps or drops as a whole, ending with `length`."""
        return list(range(self.length + 1))

    @property
    def storage_bytes(self) -> int:
        """Bytes held, growth slack included."""
        return sum(self.storages().values())

    def check_length(self, length: int) -> None:
        """Raises `ValueError` where `length` tokens can't be kept."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can't keep {length} of {self.length} tokens")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: dtype, device and head shapes come with the first states."""

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' spelling of `truncate`: a negative number of tokens to remove."""
        self.truncate(max(0, self.length - abs(tokens_to_remove)))

    def get_seq_length(self) -> int:
        """Tokens stored: also the offset of the next query."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys the next update returns, index of the first of them); asked before that update."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: grows as long as there is memory."""
        return -1


class Memory(NamedTuple):
    """Where a layer's keys and values lie, for code that is given addresses; all int64.

    Exact rows follow quantised ones, which `quantize` lays out. In the order of `Layer` in the kernels'
    `cache_rows.h`.
    """

    width: int
    """Bytes of an exact number: 4 is fp32, 2 is bf16."""
    first: int
    """The row of the cache that the exact rows start with."""
    room: int
    """Exact rows that fit."""
    bits: int
    """Of the quantised rows; 0 where there are none."""
    slots: int
    starts: int
    """Address of the row that each slot starts with, and of the one after the last: int64 `[slots + 1]`."""
    heads: int
    key_dim: int
    value_dim: int
    keys: int
    values: int
    key_head_step: int
    """Numbers from one head to the next."""
    value_head_step: int
    key_row_step: int
    value_row_step: int
    key_codes: int = 0
    value_codes: int = 0
    key_scales: int = 0
    value_scales: int = 0
    key_zeros: int = 0
    value_zeros: int = 0


class AddressedLayer(StoredLayer):
    """A layer whose rows are also read and written by compiled code, at their addresses."""

    @abstractmethod
    def room_for(self, tokens: int) -> None:
        """So many exact rows may be written after the filled ones, which `fill` then counts.

        Nobody else reads them: memory that a fork shares is left first.
        """

    @abstractmethod
    def memory(self) -> Memory:
        """Where everything lies until the layer is next changed; a layer that has room for a token."""

    @abstractmethod
    def fill(self, tokens: int) -> None:
        """Counts rows that were written into the room made for them.

        Raises:
            ValueError: there was no room for so many.
        """


class Described(NamedTuple):
    """What a layer says of its tensors, and of which ones."""

    keys: torch.Tensor
    values: torch.Tensor
    memory: Memory
    storages: dict[int, int]


def bytes_of(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address → bytes of the memory that the tensors lie in."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class DenseLayer(AddressedLayer):
    """Keys and values as they are: `[1, kv_heads, capacity, head_dim]` each, `length` tokens filled.

    One preallocated buffer, so that appending a token writes one row and cropping changes one integer.
    """

    def __init__(self, shape: HeadShape | None = None, dtype: torch.dtype | None = None) -> None:
        """`shape` is needed to tell bytes before the first token;

        a `dtype` of None takes that of the states.
        """
        super().__init__()
        self._shape = shape
        self._dtype = dtype
        self._holders: WeakSet[DenseLayer] = WeakSet([self])
        """The layers that hold the same memory, this one among them."""
        self._described: Described | None = None
        """What was last said of the tensors; asked for every token."""

    @property
    def capacity(self) -> int:
        """Tokens that fit before the layer has to grow."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def storages(self) -> dict[int, int]:
        return {} if self.keys is None else self._describe().storages

    @property
    def used_bytes(self) -> int:
        return self._bytes_per_token() * self.length

    def bytes_at(self, length: int) -> int:
        return self._bytes_per_token() * rounded_up(length)

    def growth(self, tokens: int) -> Growth:
        end = self.length + tokens
        if self.capacity >= end and not self._writes_over_others(self.length):
            return Growth()
        return Growth(self.bytes_at(end), self.storage_bytes if len(self._holders) == 1 else 0)

    def _bytes_per_token(self) -> int:
        tensors = [t for t in (self.keys, self.values) if t is not None]
        if not tensors and self._shape and self._dtype:
            return self._shape.numbers * self._dtype.itemsize
        return sum(t[:, :, 0].numel() * t.element_size() for t in tensors)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states `[1, kv_heads, new, head_dim]`;

        returns all `length` tokens so far in their dtype.
        """
        start, end = self.length, self.length + key_states.shape[-2]
        if self.capacity < end or self._writes_over_others(start):
            self._move(key_states, value_states, rounded_up(end))
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        self.is_initialized = True
        keys, values = self.read()
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def room_for(self, tokens: int) -> None:
        end = self.length + tokens
        if self.keys is None or self.values is None:
            if self._shape is None or self._dtype is None:
                raise ValueError("a layer that was told no shape has no room before its first token")
            heads, key_dim, value_dim = self._shape
            self.keys = torch.empty(1, heads, rounded_up(end), key_dim, dtype=self._dtype)
            self.values = torch.empty(1, heads, rounded_up(end), value_dim, dtype=self._dtype)
            self.is_initialized = True
            self._leave()
        elif self.capacity < end or self._writes_over_others(self.length):
            self._move(self.keys, self.values, rounded_up(end))

    def memory(self) -> Memory:
        return self._describe().memory

    def _describe(self) -> "Described":
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        known = self._described
        if known is None or known.keys is not keys or known.values is not values:
            known = self._described = Described(
                keys, values, _memory_of(keys, values), bytes_of((keys, values))
            )
        return known

    def fill(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise ValueError(f"{tokens} tokens after {self.length} don't fit a capacity of {self.capacity}")
        self.length += tokens

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _writes_over_others(self, start: int) -> bool:
        return len(self._holders) > 1 and any(o.length > start for o in self._holders if o is not self)

    def _move(self, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int) -> None:
        """Into memory of its own with room for `capacity` tokens."""
        self.keys = self._copy(self.keys, key_states, capacity)
        self.values = self._copy(self.values, value_states, capacity)
        self._leave()

    def _copy(self, buffer: torch.Tensor | None, states: torch.Tensor, capacity: int) -> torch.Tensor:
        shape = (*states.shape[:2], capacity, states.shape[-1])
        copy = states.new_empty(shape, dtype=self._dtype or states.dtype)
        if buffer is not None:
            copy[:, :, : self.length] = buffer[:, :, : self.length]
        return copy

    def _leave(self) -> None:
        self._described = None  # else what was left would stay in memory
        self._holders.discard(self)
        self._holders = WeakSet([self])

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
        self._leave()

    def fork(self) -> Self:
        other = type(self)(self._shape, self._dtype)
        other.keys, other.values, other.length = self.keys, self.values, self.length
        other.is_initialized = self.is_initialized
        other._holders = self._holders
        self._holders.add(other)
        return other

    def unshare(self, tokens: int) -> int:
        if self.keys is None or self.values is None or not self._writes_over_others(self.length):
            return 0
        self._move(self.keys, self.values, rounded_up(self.length + tokens))
        return self.used_bytes

    def change_keys(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces the filled keys `[1, kv_heads, length, head_dim]` by others of that shape."""
        if self.keys is None or self.values is None:
            return
        if len(self._holders) > 1:
            self._move(self.keys, self.values, self.capacity)
        self.keys[:, :, : self.length] = change(self.keys[:, :, : self.length])

    def pack(self, start: int) -> dict[str, torch.Tensor]:
        if self.keys is None or self.values is None:
            return {}
        rows = slice(start, self.length)
        # cloned also where a slice happens to be contiguous: it is written while the next turn goes on
        return {"keys": self.keys[0, :, rows].clone(), "values": self.values[0, :, rows].clone()}

    def unpack(self, start: int, parts: Mapping[str, torch.Tensor]) -> None:
        self.truncate(start)
        if parts and parts["keys"].shape[1]:
            self.update(parts["keys"][None], parts["values"][None])

    def reset(self) -> None:
        """Empties the layer and lets go of its memory."""
        self.keys = self.values = None
        self.is_initialized = False
        self.length = 0
        self._leave()


def _memory_of(keys: torch.Tensor, values: torch.Tensor) -> Memory:
    """`[1, kv_heads, capacity, head_dim]` each, all rows exact."""
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
