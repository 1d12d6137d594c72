"""One conversation's KV cache: its token ids, and for each of them a key and a value in every layer.

For every layer the model stores keys and values of shape `[1, kv_heads, tokens, head_dim]`; `layers` says
how.

Worked example, SmolLM2-135M in bf16: 30 layers, 3 KV heads, head dim 64. One token costs
2 × 30 × 3 × 64 × 2 bytes = 23,040 bytes; 1,000 tokens, rounded up to a capacity of 1,024, hold 23.6 MB.

The token ids are the truth. `history` is every token that was read, in order. A *row* is a token that is
still stored; an eviction drops rows and leaves the history, so that `rows` says which tokens those are, and
`positions` at which position each of them was read. Without evictions, row = token = position.

It knows ids, lengths and bytes. It refuses to know text, templates, and which conversation it serves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvchat.cache.layer import GROWTH_STEP, StoredLayer, rounded_up
from kvchat.cache.prefix import gap_bounds
from kvchat.cache.quantized_layer import convert
from kvchat.cache.state_layer import RecurrentState, StateLayer

CHECKPOINTS = 8
"""Turn ends that a model with recurrent layers can go back to."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of a cache from `start` on, and the history from token `first` on, on their way to a file."""

    start: int
    first: int
    ids: tuple[int, ...]
    """The history from `first` on."""
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    """`LAYER.NAME` → contiguous tensor."""
    checkpoints: dict[int, list[RecurrentState]]
    """History length → the states of the recurrent layers there."""


class ConversationKV:
    """Token ids, positions, and the layers that hold their keys and values.

    Between calls of `append` every layer holds exactly `len(kv)` tokens; a forward pass that is stopped or
    fails half-way leaves layers of different lengths, and `append` takes all of them back to the last commit.
    A recurrent layer can't be cropped: it goes back to the last mark, and the attention layers with it. A
    short convolution records what it reads, and goes back to any length since the last mark.
    """

    def __init__(self, layers: Sequence[CacheLayerMixin | StateLayer]) -> None:
        self.layers = list(layers)
        self.cache = Cache(layers=self.layers)  # type: ignore[arg-type]
        """What the model is handed as `past_key_values`."""
        self._history: list[int] = []
        self._rows: list[int] = []
        self._positions: list[int] = []
        self._checkpoints: dict[int, list[RecurrentState]] = {}
        """History length → the states of the recurrent layers there; ascending."""
        self._settled = 0
        """History length from which on the layers with a state record what takes them back, if they can."""
        self.saved_rows = 0
        """Leading rows that are as they were when they were last saved."""

    def __len__(self) -> int:
        """Rows stored."""
        return len(self._rows)

    @property
    def stored(self) -> list[StoredLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, StoredLayer)]

    @property
    def states(self) -> list[StateLayer]:
        """The layers that hold a state instead, or besides."""
        return [layer for layer in self.layers if isinstance(layer, StateLayer)]

    @property
    def by_steps(self) -> bool:
        """Whether the next tokens have to be read one by one: some models continue a state no other way."""
        return bool(self._history) and any(layer.by_steps for layer in self.states)

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token that was read, the evicted ones included."""
        return tuple(self._history)

    @property
    def rows(self) -> tuple[int, ...]:
        """Which token of `ids` each row is; ascending."""
        return tuple(self._rows)

    @property
    def positions(self) -> tuple[int, ...]:
        """The position that each row's key carries."""
        return tuple(self._positions)

    @property
    def has_gap(self) -> bool:
        """Whether tokens were evicted from the middle."""
        return len(self._rows) != len(self._history)

    @property
    def first_gap(self) -> int:
        """Tokens before the first evicted one."""
        return gap_bounds(self._rows, len(self._history))[0]

    @property
    def last_gap_end(self) -> int:
        """The token after the last evicted one; 0 where none was."""
        return gap_bounds(self._rows, len(self._history))[1]

    @property
    def next_position(self) -> int:
        """Where the next token goes."""
        return self._positions[-1] + 1 if self._positions else 0

    @property
    def block(self) -> int:
        """Tokens that can be evicted only together."""
        return max((layer.block for layer in self.stored), default=1)

    @property
    def edges(self) -> tuple[int, ...]:
        """Rows at which blocks begin that go only together, ending with `len(kv)`; empty for single rows."""
        layer = next((layer for layer in self.stored if layer.block > 1), None)
        return tuple(layer.block_edges()) if layer else ()

    def storages(self) -> dict[int, int]:
        """Address → bytes of every piece of memory held by layers and marks."""
        held: dict[int, int] = {}
        for layer in self.layers:
            if isinstance(layer, StoredLayer):
                held |= layer.storages()
            if isinstance(layer, StateLayer):
                held |= layer.state_storages()
        for checkpoint in self._checkpoints.values():
            for state in checkpoint:
                held |= state.storages()
        return held

    @property
    def storage_bytes(self) -> int:
        """Bytes held, growth slack included."""
        return sum(self.storages().values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows: 2 × layers × KV heads × head dim × bytes of a number × rows, unquantised."""
        return sum(layer.used_bytes for layer in self.stored)

    def bytes_at(self, rows: int) -> int:
        """`storage_bytes` once the cache has grown to so many rows."""
        tokens = max(0, rows - len(self))
        held = sum(layer.state_bytes + layer.state_growth(tokens) for layer in self.states)
        marked = sum(state.storage_bytes for checkpoint in self._checkpoints.values() for state in checkpoint)
        return held + marked + sum(layer.bytes_at(rows) for layer in self.stored)

    def bytes_to_read(self, tokens: int) -> int:
        """Bytes of memory that reading so many tokens needs at its worst moment, beside what is held.

        A layer that grows, or leaves a fork, holds its old memory while it copies; layers do so in turn.
        """
        growths = [layer.growth(tokens) for layer in self.stored]
        copying = max((growth.freed for growth in growths), default=0)
        states = sum(layer.state_growth(tokens) for layer in self.states)
        return sum(growth.allocated - growth.freed for growth in growths) + copying + states

    @contextmanager
    def append(self, ids: Sequence[int]) -> Iterator[Cache]:
        """Commits `ids` if the forward pass inside the block fills every layer; else nothing happened.

        With recurrent layers, a pass that failed takes the cache back to the last mark.
        """
        committed = len(self._history)
        try:
            yield self.cache
            self._commit(ids)
        finally:
            if len(self._history) == committed:
                self._roll_back()

    def _commit(self, ids: Sequence[int]) -> None:
        expected = len(self) + len(ids)
        if any(layer.length != expected for layer in self.stored):
            lengths = sorted({layer.length for layer in self.stored})
            raise RuntimeError(f"layers hold {lengths} tokens instead of {expected}")
        first = len(self._history)
        position = self.next_position
        self._history.extend(ids)
        self._rows.extend(range(first, first + len(ids)))
        self._positions.extend(range(position, position + len(ids)))

    def _roll_back(self) -> None:
        for layer in self.stored:
            layer.truncate(min(layer.length, len(self)))
        if self.states:
            self._return_to(self._restorable(len(self._history)))

    def checkpoint(self) -> None:
        """Makes this length one that `truncate` can come back to; needed by layers with a state only.

        A layer that records what takes it back starts over here, so that its memory does not grow for ever.
        """
        length = len(self._history)
        if not self.states or not length:
            return
        if length not in self._checkpoints:
            self._checkpoints[length] = [layer.state() for layer in self.states]
        for old in list(self._checkpoints)[:-CHECKPOINTS]:
            del self._checkpoints[old]
        for layer in self.states:
            layer.settle()
        self._settled = length

    def reachable(self, length: int) -> int:
        """The longest history at most `length` that the cache can go back to and be exact.

        Before a gap everything is as if the gap had never been; inside it there is nothing; after it only
        what lies after the whole gap. Recurrent layers can go back to marks only; where all layers with a
        state are short convolutions, also to everything after the last mark.
        """
        if length <= self.last_gap_end:
            length = min(length, self.first_gap)
        if not self.states or length >= len(self._history):
            return min(length, len(self._history))
        return self._restorable(length)

    def _restorable(self, length: int) -> int:
        """The longest history at most `length` that the layers with a state can be put back to."""
        if self._rewinds_to(length):
            return length
        return max((checkpoint for checkpoint in self._checkpoints if checkpoint <= length), default=0)

    def _rewinds_to(self, length: int) -> bool:
        return 0 < length >= self._settled and all(layer.can_rewind for layer in self.states)

    def truncate(self, length: int) -> None:
        """Goes back to the first `length` tokens of the history.

        Raises:
            ValueError: `reachable` says that this length can't be had.
        """
        if length != self.reachable(length):
            raise ValueError(f"can't go back to {length} of {len(self._history)} tokens")
        if length == len(self._history):
            return
        rows = sum(1 for row in self._rows if row < length)
        for layer in self.stored:
            layer.truncate(rows)
        del self._history[length:], self._rows[rows:], self._positions[rows:]
        self.saved_rows = min(self.saved_rows, rows)
        if self.states:
            self._return_to(length)

    def _return_to(self, length: int) -> None:
        """Puts the layers with a state, and all with them, back to a length that `_restorable` gave."""
        if self._rewinds_to(length):
            for layer in self.states:
                layer.rewind(length - self._settled)
        else:
            self._restore(length)
        for stored in self.stored:
            stored.truncate(length)
        del self._history[length:], self._rows[length:], self._positions[length:]
        self.saved_rows = min(self.saved_rows, length)
        self._checkpoints = {
            checkpoint: states for checkpoint, states in self._checkpoints.items() if checkpoint <= length
        }

    def _restore(self, checkpoint: int) -> None:
        """Puts the layers with a state back to a mark; 0 is the empty cache."""
        states = self._checkpoints[checkpoint] if checkpoint else [None] * len(self.states)
        for layer, state in zip(self.states, states, strict=True):
            layer.restore(state)
        self._settled = checkpoint

    def select(self, rows: Sequence[int]) -> None:
        """Evicts every row that is not in `rows` (ascending indices of rows); positions stay as they are.

        What stays was computed with the evicted tokens in sight, and keeps their influence.

        Raises:
            ValueError: there are recurrent layers, which can't forget tokens.
        """
        if self.states:
            raise ValueError("a recurrent state can't forget tokens")
        index = torch.tensor(list(rows), dtype=torch.int64)
        for layer in self.stored:
            layer.select(index)
        self._rows = [self._rows[row] for row in rows]
        self._positions = [self._positions[row] for row in rows]
        self.saved_rows = 0

    def reposition(self, positions: Sequence[int]) -> None:
        """Notes that the keys were turned to other positions."""
        self._positions = list(positions)
        self.saved_rows = 0

    def restart(self, history: Sequence[int], rows: Sequence[int]) -> None:
        """Notes that the rows, read anew at positions of their own, stand for those tokens of `history`."""
        if len(rows) != len(self):
            raise ValueError(f"{len(rows)} rows don't describe {len(self)}")
        self._history, self._rows = list(history), list(rows)
        self.saved_rows = 0

    def store_in(self, layers: Sequence[CacheLayerMixin | StateLayer]) -> None:
        """Moves everything into fresh layers of another precision, one by one; states move as they are."""
        for index, (old, new) in enumerate(zip(self.layers, layers, strict=True)):
            if (
                isinstance(old, StoredLayer)
                and isinstance(new, StoredLayer)
                and not isinstance(old, StateLayer)
            ):
                convert(old, new)
                self.layers[index] = new
                old.reset()
        self.cache = Cache(layers=self.layers)  # type: ignore[arg-type]
        self.saved_rows = 0

    def rows_within(self, budget: int, most: int) -> int:
        """Rows, at most `most`, to which the cache can grow while it holds no more than `budget` bytes.

        Growing copies layer by layer, so that the old memory of one layer is held besides.
        """

        def peak(rows: int) -> int:
            copying = max((layer.bytes_at(max(0, rows - GROWTH_STEP)) for layer in self.stored), default=0)
            return self.bytes_at(rows) + copying

        fitting = (rows for rows in range(rounded_up(most), 0, -GROWTH_STEP) if peak(rows) <= budget)
        return min(most, next(fitting, 0))

    def unshare(self, tokens: int) -> int:
        """Copies what a fork shares, where appending so many tokens would write over it; returns bytes."""
        return sum(layer.unshare(tokens) for layer in self.stored)

    def fork(self, length: int) -> "ConversationKV":
        """A cache of the first `length` tokens that shares this one's memory until one writes over the other.

        Raises:
            ValueError: `reachable` says that this length can't be had.
        """
        other = ConversationKV([layer.fork() if hasattr(layer, "fork") else layer for layer in self.layers])
        other._history, other._rows = self._history[:], self._rows[:]
        other._positions, other._checkpoints = self._positions[:], dict(self._checkpoints)
        other._settled = self._settled
        other.truncate(length)
        return other

    def pack(self) -> "PackedRows":
        """Copies of everything that is not saved yet; the rows count as saved from now on.

        Layers with a state are saved as their marks, and this length becomes one.
        """
        self.checkpoint()
        start = min((layer.pack_start(self.saved_rows) for layer in self.stored), default=self.saved_rows)
        tensors = {
            f"{index}.{name}": tensor
            for index, layer in enumerate(self.layers)
            if isinstance(layer, StoredLayer)
            for name, tensor in layer.pack(start).items()
        }
        first = self._rows[start] if start < len(self) else len(self._history)
        first = 0 if start == 0 else first
        checkpoints = {m: states for m, states in self._checkpoints.items() if m > first}
        self.saved_rows = len(self)
        return PackedRows(
            start,
            first,
            tuple(self._history[first:]),
            tuple(self._rows[start:]),
            tuple(self._positions[start:]),
            tensors,
            checkpoints,
        )

    def unpack(self, packed: "PackedRows") -> None:
        """Keeps the rows before `packed.start` and puts the packed ones after them, bit for bit.

        Raises:
            ValueError: they don't continue what is here, or don't fit the layers.
        """
        if packed.start > len(self) or packed.first > len(self._history):
            raise ValueError(f"rows from {packed.start} on don't continue {len(self)} rows")
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StoredLayer):
                names = (name for name in packed.tensors if name.startswith(f"{index}."))
                layer.unpack(packed.start, {name.partition(".")[2]: packed.tensors[name] for name in names})
        self._history[packed.first :] = packed.ids
        self._rows[packed.start :] = packed.rows
        self._positions[packed.start :] = packed.positions
        self._checkpoints = {
            m: states for m, states in self._checkpoints.items() if m <= packed.first
        } | packed.checkpoints
        self._restore_states()
        lengths = {layer.length for layer in self.stored} - {len(self)}
        if lengths:
            raise ValueError(f"layers hold {sorted(lengths)} rows instead of {len(self)}")
        self.saved_rows = len(self)

    def _restore_states(self) -> None:
        """Puts the layers with a state where the history ends."""
        end = len(self._history)
        if self.states and end not in {0, *self._checkpoints}:
            raise ValueError(f"there is no state of {end} tokens")
        if self.states:
            self._restore(end)

    def clear(self) -> None:
        """Forgets every token and lets go of the memory."""
        self._history.clear()
        self._rows.clear()
        self._positions.clear()
        self._checkpoints.clear()
        self._settled = 0
        self.saved_rows = 0
        for layer in self.layers:
            layer.reset()
