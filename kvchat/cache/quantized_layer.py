"""Keys and values of one attention layer in 8 or 4 bits: quantised blocks, then an unquantised residual.

Blocks start at multiples of `BLOCK` rows. A finished block is quantised once; later appends don't change it.
The newest token, and the others of its block, stay unquantised.

    row      0         64        128   150
             ┌─────────┬─────────┬─────┐
             │ codes   │ codes   │exact│       slots 0 and 1 with 64 rows each, a residual of 22
             └─────────┴─────────┴─────┘

A crop into a quantised block only lowers its row count; its bits stay. The rows that follow go to the
residual, and once the block is finished they get a slot of their own. So every block starts at a multiple of
`BLOCK` after any crop or stopped pass, and all layers of a cache have the same blocks.

Which rows are quantised depends on lengths alone, not on how tokens were batched. Must not depend on token
ids.
"""

from collections.abc import Iterator, Mapping
from typing import Self

import torch

from kvchat.cache.cow_buffer import CowBuffer
from kvchat.cache.layer import (
    GROWTH_STEP,
    AddressedLayer,
    Growth,
    HeadShape,
    Memory,
    StoredLayer,
)
from kvchat.cache.quant_codec import BLOCK, PER_CHANNEL, PER_TOKEN, SCALE, Codes, dequantise, quantise

COUNTS = "counts"
"""Name of the packed tensor with the row count of each slot."""


def finished_blocks(start: int, end: int) -> list[int]:
    """Row counts of the new slots for a residual that spans row `start` to row `end`.

    The block of the newest row does not count as finished, even where it is full.
    """
    stop = (end - 1) // BLOCK * BLOCK
    if stop <= start:
        return []
    first = BLOCK - start % BLOCK
    return [first, *[BLOCK] * ((stop - start - first) // BLOCK)]


def rows_of(counts: list[int]) -> torch.Tensor:
    """The row indices of each slot, from row 0 on: `[slots, BLOCK]`.

    A slot with fewer rows repeats its last one, which changes neither minimum nor maximum.
    """
    lengths = torch.tensor(counts, dtype=torch.int64)[:, None]
    ends = lengths.cumsum(0)
    starts = ends - lengths
    return torch.minimum(starts + torch.arange(BLOCK), ends - 1)


class QuantizedLayer(AddressedLayer):
    """Keys and values in 8 or 4 bits, the newest 1 to `BLOCK` tokens unquantised.

    4 bits: keys have a scale and a zero point per channel of a block, values one per token. Keys have a few
    channels of large numbers, which would cost the others their precision; values have none (KIVI, arXiv
    2402.02750). 8 bits: the same, but values without a zero point.
    """

    block = BLOCK

    def __init__(self, bits: int, shape: HeadShape | None = None, dtype: torch.dtype | None = None) -> None:
        """`shape` and `dtype` of the states are needed to compute bytes before the first token; None takes
        them from the first states. States of another dtype are converted.

        Raises:
            ValueError: `bits` is neither 8 nor 4.
        """
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"keys and values are quantised to 8 or 4 bits, not {bits}")
        self.bits = bits
        self._given = shape, dtype
        self._shape, self._dtype = shape, dtype
        self._counts: list[int] = []
        """Rows of each slot in use."""
        self._slots = CowBuffer(GROWTH_STEP // BLOCK, offset=1)
        """The residual is the block that is stored outside."""
        self._residual = CowBuffer(BLOCK)
        """`keys` and `values`, `[tokens, kv_heads, head_dim]`."""
        self._packed_rows = 0
        """Quantised rows at the last `pack`."""
        self._starts = torch.zeros(1, dtype=torch.int64)
        """Keeps alive what `Memory.starts` points to."""
        self._addresses: tuple[tuple[int, int, tuple[int, ...]], Memory] | None = None
        """((reallocations of slots, of residual, row counts), result of `memory` then)."""

    @property
    def _start(self) -> int:
        """Row at which the residual starts."""
        return self.length - self._residual.count

    def block_edges(self) -> list[int]:
        """The first row of each quantised block and of the residual, then `length`; ascending.

        Blocks start at multiples of `block`; so does the residual, except after a crop into its block.
        """
        return [*range(0, self._start, BLOCK), self._start, self.length]

    def storages(self) -> dict[int, int]:
        return self._slots.storages() | self._residual.storages()

    @property
    def used_bytes(self) -> int:
        return len(self._counts) * self._slot_bytes() + self._residual.count * self._token_bytes()

    def bytes_at(self, length: int) -> int:
        if length == 0:
            return 0
        slots = len(finished_blocks(0, length))
        if length > self._start:
            slots = len(self._counts) + len(finished_blocks(self._start, length))
        return self._slots.rounded_up(slots) * self._slot_bytes() + BLOCK * self._token_bytes()

    def growth(self, tokens: int) -> Growth:
        slots = finished_blocks(self._start, self.length + tokens)
        used, exact = len(self._counts), self._residual.count
        grown = self._slots.growth(used, used + len(slots), self._slot_bytes())
        start = 0 if slots else exact
        residual = self._residual.growth(start, exact + tokens - sum(slots), self._token_bytes())
        return Growth(grown.allocated + residual.allocated, grown.freed + residual.freed)

    def unshare(self, tokens: int) -> int:
        slots = finished_blocks(self._start, self.length + tokens)
        used, exact = len(self._counts), self._residual.count
        copied = self._slots.unshare(used, used + len(slots)) if slots else 0
        return copied + self._residual.unshare(0 if slots else exact, exact + tokens - sum(slots))

    def _token_bytes(self) -> int:
        return self._shape.numbers * self._dtype.itemsize if self._shape and self._dtype else 0

    def _slot_bytes(self) -> int:
        if self._shape is None:
            return 0
        heads, key_dim, _ = self._shape
        scales = 2 * key_dim + (1 if self.bits == 8 else 2) * BLOCK
        return self._shape.numbers * BLOCK * self.bits // 8 + heads * scales * SCALE.itemsize

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states `[1, kv_heads, new, head_dim]`; returns all `length` tokens in their dtype."""
        self._append(key_states, value_states)
        return self._read("key", key_states.dtype), self._read("value", value_states.dtype)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self._residual["keys"].dtype
        return self._read("key", dtype), self._read("value", dtype)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self._shape is None:
            _, heads, _, key_dim = key_states.shape
            self._shape = HeadShape(heads, key_dim, value_states.shape[-1])
        self._dtype = self._dtype or key_states.dtype
        states = {"keys": key_states, "values": value_states}
        new = {name: tensor[0].transpose(0, 1).to(self._dtype) for name, tensor in states.items()}
        counts = finished_blocks(self._start, self.length + key_states.shape[-2])
        if counts:
            exact = {name: [tensor] for name, tensor in self._residual.filled.items()}
            new = {name: torch.cat([*exact.get(name, []), tensor]) for name, tensor in new.items()}
            self._slots.write(len(self._counts), _quantised(new, rows_of(counts), self.bits))
            new = {name: tensor[sum(counts) :] for name, tensor in new.items()}
        self._residual.write(0 if counts else self._residual.count, new)
        self._counts += counts
        self.length += key_states.shape[-2]
        self.is_initialized = True

    def reserve(self, tokens: int) -> None:
        """Quantises the block that the next token finishes; the tokens must not finish a second one."""
        if self._shape is None or self._dtype is None:
            raise ValueError("a layer without a known shape can't be allocated before its first token")
        if counts := finished_blocks(self._start, self.length + 1):
            exact = self._residual.filled
            self._slots.write(len(self._counts), _quantised(exact, rows_of(counts), self.bits))
            self._counts += counts
            self._residual.write(0, {name: tensor[sum(counts) :] for name, tensor in exact.items()})
        shape, dtype = self._shape, self._dtype
        self._residual.reserve(tokens, lambda: _empty(shape, dtype))
        self.is_initialized = True

    def memory(self) -> Memory:
        state = (self._slots.reallocations, self._residual.reallocations, tuple(self._counts))
        if self._addresses is None or self._addresses[0] != state:
            self._addresses = state, self._located()
        return self._addresses[1]

    def _located(self) -> Memory:
        assert self._shape is not None
        self._starts = torch.tensor([0, *self._counts]).cumsum(0)
        keys, values = self._residual.allocated("keys"), self._residual.allocated("values")
        addresses = {name: t.data_ptr() for name, t in self._slots.filled.items()} if self._counts else {}
        return Memory(
            width=keys.element_size(),
            first=self._start,
            room=len(keys),
            bits=self.bits if self._counts else 0,
            slots=len(self._counts),
            starts=self._starts.data_ptr(),
            heads=self._shape.kv_heads,
            key_dim=self._shape.key_dim,
            value_dim=self._shape.value_dim,
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            key_head_step=keys.stride(1),
            value_head_step=values.stride(1),
            key_row_step=keys.stride(0),
            value_row_step=values.stride(0),
            **addresses,
        )

    def advance(self, tokens: int) -> None:
        if self._residual.count + tokens > self._residual.capacity:
            raise ValueError(f"{tokens} tokens don't fit after {self._residual.count} unquantised ones")
        self._residual.count += tokens
        self.length += tokens

    def _read(self, what: str, dtype: torch.dtype) -> torch.Tensor:
        """All keys or all values, `[1, kv_heads, length, head_dim]`, dequantised."""
        exact = self._residual[f"{what}s"]
        _, heads, dim = exact.shape
        out = exact.new_empty((heads, self.length, dim), dtype=dtype)
        row = 0
        for first, last, count in _runs(self._counts):
            end = row + (last - first - 1) * BLOCK + count
            codes = _codes(self._slots.filled, what, first, last)
            if count == BLOCK:
                dequantise(codes, out[:, row:end].view(heads, -1, BLOCK, dim).transpose(0, 1))
            else:
                whole = out.new_empty((1, heads, BLOCK, dim))
                dequantise(codes, whole)
                out[:, row:end] = whole[0, :, :count]
            row = end
        out[:, row:] = exact.transpose(0, 1)
        return out[None]

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens; a block that is cut keeps its bits and has fewer rows.

        Raises:
            ValueError: `length` is negative or more than is stored.
        """
        self.check_length(length)
        self._residual.count = max(0, length - self._start)
        surplus = sum(self._counts) - length
        while surplus > 0:
            dropped = min(surplus, self._counts[-1])
            self._counts[-1] -= dropped
            surplus -= dropped
            if not self._counts[-1]:
                self._counts.pop()
        self._slots.count = len(self._counts)
        self._packed_rows = min(self._packed_rows, length)
        self.length = length

    def select(self, rows: torch.Tensor) -> None:
        """Keeps those rows (ascending int64 indices), compacted into newly allocated memory.

        Quantised blocks keep their bits; rows of the residual can be chosen freely.

        Raises:
            ValueError: the rows cut a quantised block.
        """
        mask = torch.zeros(self.length, dtype=torch.bool).index_fill_(0, rows, True)
        for first in range(0, self._start, BLOCK):
            block = mask[first : min(first + BLOCK, self._start)]
            if block.any() and not block.all():
                raise ValueError(f"the rows cut the block from row {first} on")
        slots = mask[rows_of(self._counts)[:, 0]].nonzero()[:, 0]
        start = self._start
        self._counts = [self._counts[slot] for slot in slots.tolist()]
        self._slots.select(slots)
        self._residual.select(rows[rows >= start] - start)
        self.length = sum(self._counts) + self._residual.count
        self._packed_rows = 0

    def fork(self) -> Self:
        other = type(self)(self.bits, *self._given)
        other._shape, other._dtype = self._shape, self._dtype
        other._counts, other._packed_rows = self._counts[:], self._packed_rows
        other._slots, other._residual = self._slots.fork(), self._residual.fork()
        other.length, other.is_initialized = self.length, self.is_initialized
        return other

    def pack_start(self, length: int) -> int:
        """The start of the last block before which nothing changed since the last `pack`.

        A multiple of `block`, the same for every layer of a cache.
        """
        return min(length, self._packed_rows) // BLOCK * BLOCK

    def pack(self, start: int) -> dict[str, torch.Tensor]:
        """Contiguous copies of what is stored from token `start` on; `start` comes from `pack_start`.

        `counts`, int32, has the row count of each slot.

        Raises:
            ValueError: no slot starts at `start`.
        """
        exact = self._residual.filled
        if not exact:
            return {}
        starts = [*rows_of(self._counts)[:, 0].tolist(), self._start]
        if start not in starts:
            raise ValueError(f"no block starts at row {start}")
        first = starts.index(start)
        parts = {name: tensor[first:].clone() for name, tensor in self._slots.filled.items()}
        parts |= {name: tensor.clone() for name, tensor in exact.items()}
        self._packed_rows = self._start
        return parts | {COUNTS: torch.tensor(self._counts[first:], dtype=torch.int32)}

    def unpack(self, start: int, parts: Mapping[str, torch.Tensor]) -> None:
        self.check_length(start)
        if not parts:
            self.truncate(start)
            return
        if not {COUNTS, "keys", "values"} <= parts.keys():
            raise ValueError(f"tensors of a quantised layer are missing; it has {sorted(parts)}")
        exact = {name: parts[name] for name in ("keys", "values")}
        slots = {name: tensor for name, tensor in parts.items() if name != COUNTS and name not in exact}
        counts: list[int] = parts[COUNTS].tolist()
        _check_tensors(exact, slots, len(counts), self.bits, (self._shape, self._dtype))
        self._check_counts(start, [*counts, len(exact["keys"])])
        self.truncate(start)
        if slots:
            self._slots.write(len(self._counts), slots)
        self._residual.write(0, exact)
        self._counts += counts
        self._shape, self._dtype = _shape_of(exact), exact["keys"].dtype
        self.length = start + sum(counts) + self._residual.count
        self._packed_rows = self._start
        self.is_initialized = True

    def _check_counts(self, start: int, counts: list[int]) -> None:
        """Raises `ValueError` where a slot, or the residual, would cross a block boundary."""
        row = start
        for count in counts[:-1]:
            if not 1 <= count <= BLOCK - row % BLOCK:
                raise ValueError(f"a slot of {count} rows can't start at row {row}")
            row += count
        if start > self._start or counts[-1] > BLOCK - row % BLOCK:
            raise ValueError(f"a residual of {counts[-1]} rows can't follow row {row} of {self.length}")

    def reset(self) -> None:
        """Empties the layer and frees its memory."""
        self._shape, self._dtype = self._given
        self._counts = []
        self._slots.clear()
        self._residual.clear()
        self._packed_rows = self.length = 0
        self.is_initialized = False


def _empty(shape: HeadShape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Keys and values without tokens, `[0, kv_heads, head_dim]`."""
    dims = {"keys": shape.key_dim, "values": shape.value_dim}
    return {name: torch.empty(0, shape.kv_heads, dim, dtype=dtype) for name, dim in dims.items()}


def _shape_of(exact: Mapping[str, torch.Tensor]) -> HeadShape:
    """The head shape of `keys` and `values` `[tokens, kv_heads, head_dim]`."""
    _, heads, key_dim = exact["keys"].shape
    return HeadShape(heads, key_dim, exact["values"].shape[-1])


def _quantised(exact: Mapping[str, torch.Tensor], rows: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Slots for the states `[tokens, kv_heads, head_dim]` at `rows` `[slots, BLOCK]`."""
    keys = quantise(exact["keys"][rows].transpose(1, 2), bits, PER_CHANNEL)
    values = quantise(exact["values"][rows].transpose(1, 2), bits, PER_TOKEN)
    both = {f"key_{name}": tensor for name, tensor in keys._asdict().items()}
    both |= {f"value_{name}": tensor for name, tensor in values._asdict().items()}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _runs(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first slot, slot after the last, rows of each): runs of full slots, and each shorter slot."""
    first = 0
    for slot, count in enumerate(counts):
        if count < BLOCK:
            if first < slot:
                yield first, slot, BLOCK
            yield slot, slot + 1, count
            first = slot + 1
    if first < len(counts):
        yield first, len(counts), BLOCK


def _codes(slots: Mapping[str, torch.Tensor], what: str, first: int, last: int) -> Codes:
    zeros = slots.get(f"{what}_zeros")
    return Codes(
        slots[f"{what}_codes"][first:last],
        slots[f"{what}_scales"][first:last],
        None if zeros is None else zeros[first:last],
    )


def _check_tensors(
    exact: Mapping[str, torch.Tensor],
    slots: Mapping[str, torch.Tensor],
    count: int,
    bits: int,
    known: tuple[HeadShape | None, torch.dtype | None],
) -> None:
    """Raises `ValueError` where names, dtypes or shapes don't fit a layer of that shape and dtype."""
    keys, values = exact["keys"], exact["values"]
    if (keys.ndim, values.ndim) != (3, 3) or keys.shape[:2] != values.shape[:2]:
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} don't match")
    shape, dtype = known[0] or _shape_of(exact), known[1] or keys.dtype
    one = {
        "keys": torch.zeros(1, shape.kv_heads, shape.key_dim, dtype=dtype),
        "values": torch.zeros(1, shape.kv_heads, shape.value_dim, dtype=dtype),
    }
    expected = {name: (len(keys), tensor) for name, tensor in one.items()}
    if count or slots:
        expected |= {name: (count, slot) for name, slot in _quantised(one, rows_of([1]), bits).items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in {**exact, **slots}.items()}
    if found != {n: ((rows, *like.shape[1:]), like.dtype) for n, (rows, like) in expected.items()}:
        raise ValueError(f"the tensors don't fit a layer of {bits} bits, {shape} and {dtype}: {found}")


def convert(layer: StoredLayer, to: StoredLayer) -> None:
    """Appends everything in `layer` to the empty layer `to`.

    From one quantised precision to another, numbers are rounded a second time.

    Raises:
        ValueError: `to` is not empty.
    """
    if to.length:
        raise ValueError(f"the target layer has {to.length} tokens already")
    if layer.length:
        to.update(*layer.read())
