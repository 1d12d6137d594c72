"""The interfaces of a layer that stores keys and values.

`StoredLayer` is what the cache needs of it, `AddressedLayer` what compiled code needs. `dense_layer` and
`quantized_layer` implement both. Must not depend on token ids.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

import torch
from transformers.cache_utils import CacheLayerMixin

GROWTH_STEP = 256
"""Tokens by which a layer grows. Copying 94 MB takes about 13 ms, so growth costs about 0.05 ms a token."""


class HeadShape(NamedTuple):
    """The shape of one token in one layer: a key and a value for each KV head."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """Numbers of one token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class Growth(NamedTuple):
    """Bytes that an update allocates, and bytes that it frees after copying them."""

    allocated: int = 0
    freed: int = 0


def rounded_up(tokens: int) -> int:
    """`tokens`, rounded up to the next growth step."""
    return -(-tokens // GROWTH_STEP) * GROWTH_STEP


class StoredLayer(CacheLayerMixin):
    """Keys and values of one layer for `length` tokens.

    Implements transformers' cache layer interface. Stores every token even where the model has a sliding
    window: the mask hides tokens outside the window, and after a crop they can be inside again.
    """

    is_croppable = True
    is_sliding = False
    block: int = 1
    """Tokens that can be evicted only together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    @abstractmethod
    def storages(self) -> dict[int, int]:
        """Address → bytes of every piece of memory, growth slack included. Forks may share them."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of the `length` tokens, without growth slack."""

    @abstractmethod
    def bytes_at(self, length: int) -> int:
        """Bytes that a layer of `length` tokens allocates, growth slack included."""

    @abstractmethod
    def growth(self, tokens: int) -> Growth:
        """What an `update` with so many tokens allocates and frees."""

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
        """Keeps those rows (ascending int64 indices), compacted into newly allocated memory.

        Blocks are kept or evicted as a whole.
        """

    @abstractmethod
    def fork(self) -> Self:
        """A layer with the same content that shares this one's memory, copy-on-write."""

    def unshare(self, tokens: int) -> int:
        """Copies shared memory that appending so many tokens would overwrite; returns the bytes copied.

        An `update` does the same by itself; a separate call can be timed and logged.
        """
        return 0

    @abstractmethod
    def pack(self, start: int) -> dict[str, torch.Tensor]:
        """Contiguous copies of what is stored from token `start` on; `start` comes from `pack_start`."""

    @abstractmethod
    def unpack(self, start: int, parts: Mapping[str, torch.Tensor]) -> None:
        """Keeps the first `start` tokens and appends what `pack(start)` returned, bit for bit.

        Raises:
            ValueError: the parts don't fit this layer.
        """

    def pack_start(self, length: int) -> int:
        """The largest token at most `length` from which `pack` can start."""
        return length

    def block_edges(self) -> list[int]:
        """Rows at which blocks start that `select` keeps or evicts as a whole, then `length`."""
        return list(range(self.length + 1))

    @property
    def storage_bytes(self) -> int:
        """Bytes allocated, growth slack included."""
        return sum(self.storages().values())

    def check_length(self, length: int) -> None:
        """Raises `ValueError` where there are fewer than `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can't keep {length} of {self.length} tokens")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: dtype, device and head shapes come with the first states."""

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' name for `truncate`; takes a negative number of tokens to remove."""
        self.truncate(max(0, self.length - abs(tokens_to_remove)))

    def get_seq_length(self) -> int:
        """Tokens stored: also the offset of the next query."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the next update returns, index of the first of them); called before that update."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit but memory."""
        return -1


class Memory(NamedTuple):
    """Addresses and strides of a layer's keys and values, for compiled code; all int64.

    Unquantised rows follow quantised ones (`quantized_layer`). The kernels expect the fields in the order of
    `Layer` in `cache_rows.h`.
    """

    width: int
    """Bytes of an unquantised number: 4 is fp32, 2 is bf16."""
    first: int
    """The first unquantised row of the cache."""
    room: int
    """Capacity for unquantised rows."""
    bits: int
    """Of the quantised rows; 0 where there are none."""
    slots: int
    starts: int
    """Address of the first row of each slot, then of the row after the last slot: int64 `[slots + 1]`."""
    heads: int
    key_dim: int
    value_dim: int
    keys: int
    values: int
    key_head_step: int
    """Stride from one head to the next, in numbers."""
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
    """A layer that compiled code also reads and writes, at its addresses."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Allocates so many unquantised rows after the last one; copies memory that a fork shares first.

        The caller writes them and then calls `advance`.
        """

    @abstractmethod
    def memory(self) -> Memory:
        """The addresses, valid until the layer changes; call `reserve` first."""

    @abstractmethod
    def advance(self, tokens: int) -> None:
        """Adds rows that were written into reserved memory to `length`.

        Raises:
            ValueError: fewer were reserved.
        """


def bytes_of(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address → bytes of the tensors' memory."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
