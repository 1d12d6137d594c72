"""The KV cache of one conversation: its token ids, and for each of them a key and a value in every layer.

For every layer the model stores keys and values of shape `[1, kv_heads, tokens, head_dim]`; the modules
`dense_layer`, `quantized_layer` and `state_layer` say how.

Worked example, SmolLM2-135M in bf16: 30 layers, 3 KV heads, head dim 64. One token costs
2 × 30 × 3 × 64 × 2 bytes = 23,040 bytes; 1,000 tokens, rounded up to a capacity of 1,024, take 23.6 MB.

Must not depend on texts, chat templates or conversation ids.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvchat.cache.layer import StoredLayer
from kvchat.cache.quantized_layer import convert
from kvchat.cache.state_checkpoints import StateCheckpoints
from kvchat.cache.state_layer import StateLayer
from kvchat.cache.token_index import TokenIndex


class ConversationKV:
    """The token index, the layers with their keys and values, and the checkpoints of recurrent states.

    Between calls of `append` every layer holds exactly `len(kv)` tokens. A forward pass that is stopped or
    fails leaves layers of different lengths; `append` then returns all of them to the last commit, or with
    recurrent layers to the last checkpoint.
    """

    def __init__(self, layers: Sequence[CacheLayerMixin | StateLayer]) -> None:
        self.layers = list(layers)
        self.cache = Cache(layers=self.layers)  # type: ignore[arg-type]
        """What the model gets as `past_key_values`."""
        self.index = TokenIndex()
        self.checkpoints = StateCheckpoints(self.states)
        self.saved_rows = 0
        """Leading rows that have not changed since they were saved to disk."""

    def __len__(self) -> int:
        """Rows stored."""
        return len(self.index.rows)

    @property
    def stored(self) -> list[StoredLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, StoredLayer)]

    @property
    def states(self) -> list[StateLayer]:
        """The layers that hold a state, with or without keys and values."""
        return [layer for layer in self.layers if isinstance(layer, StateLayer)]

    @property
    def by_steps(self) -> bool:
        """Whether the next tokens have to be read one by one: some models continue a state no other way."""
        return bool(self.index.ids) and any(layer.by_steps for layer in self.states)

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token that was read, evicted ones included."""
        return tuple(self.index.ids)

    @property
    def rows(self) -> tuple[int, ...]:
        """Which token of `ids` each row is; ascending."""
        return tuple(self.index.rows)

    @property
    def positions(self) -> tuple[int, ...]:
        """The position that each row's key carries."""
        return tuple(self.index.positions)

    @property
    def block(self) -> int:
        """Tokens that can be evicted only together."""
        return max((layer.block for layer in self.stored), default=1)

    @property
    def edges(self) -> tuple[int, ...]:
        """Rows at which blocks start that are evicted as a whole, then `len(kv)`; empty for single rows."""
        layer = next((layer for layer in self.stored if layer.block > 1), None)
        return tuple(layer.block_edges()) if layer else ()

    def storages(self) -> dict[int, int]:
        """Address → bytes of every piece of memory of layers and checkpoints."""
        memory = self.checkpoints.storages()
        for layer in self.layers:
            if isinstance(layer, StoredLayer):
                memory |= layer.storages()
            if isinstance(layer, StateLayer):
                memory |= layer.state_storages()
        return memory

    @property
    def storage_bytes(self) -> int:
        """Bytes allocated, growth slack included."""
        return sum(self.storages().values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows: 2 × layers × KV heads × head dim × bytes of a number × rows, unquantised."""
        return sum(layer.used_bytes for layer in self.stored)

    def bytes_at(self, rows: int) -> int:
        """`storage_bytes` once the cache has grown to so many rows."""
        tokens = max(0, rows - len(self))
        states = sum(layer.state_bytes + layer.state_growth(tokens) for layer in self.states)
        copies = sum(state.storage_bytes for at in self.checkpoints.states.values() for state in at)
        return states + copies + sum(layer.bytes_at(rows) for layer in self.stored)

    def bytes_to_read(self, tokens: int) -> int:
        """Peak bytes that reading so many tokens needs beyond what is allocated.

        A layer that grows, or stops sharing memory, needs old and new memory while it copies; one layer
        copies at a time.
        """
        growths = [layer.growth(tokens) for layer in self.stored]
        copying = max((growth.freed for growth in growths), default=0)
        states = sum(layer.state_growth(tokens) for layer in self.states)
        return sum(growth.allocated - growth.freed for growth in growths) + copying + states

    @contextmanager
    def append(self, ids: Sequence[int]) -> Iterator[Cache]:
        """Commits `ids` if the forward pass inside the block fills every layer; else nothing changes.

        With recurrent layers, a failed pass returns the cache to the last checkpoint.
        """
        committed = len(self.index.ids)
        try:
            yield self.cache
            expected = len(self) + len(ids)
            if lengths := sorted({layer.length for layer in self.stored} - {expected}):
                raise RuntimeError(f"layers hold {lengths} tokens instead of {expected}")
            self.index.append(ids)
        finally:
            if len(self.index.ids) == committed:
                self._crop(self.checkpoints.restorable(committed) if self.states else committed)

    def checkpoint(self) -> None:
        """Makes the current length one that `truncate` can return to; only layers with a state need it."""
        self.checkpoints.take(len(self.index.ids))

    def reachable(self, length: int) -> int:
        """The longest history at most `length` that the cache can return to exactly.

        Tokens before a gap are unaffected by the gap. A length inside a gap is not reachable, one after it
        only where it lies after the last evicted token. Layers with a state return to checkpoints only, or,
        where all of them are short convolutions, to any length after the last checkpoint.
        """
        if length <= self.index.last_gap_end:
            length = min(length, self.index.first_gap)
        if not self.states or length >= len(self.index.ids):
            return min(length, len(self.index.ids))
        return self.checkpoints.restorable(length)

    def truncate(self, length: int) -> None:
        """Returns to the first `length` tokens of the history.

        Raises:
            ValueError: this length is not `reachable`.
        """
        if length != self.reachable(length):
            raise ValueError(f"can't go back to {length} of {len(self.index.ids)} tokens")
        if length < len(self.index.ids):
            self._crop(length)

    def _crop(self, length: int) -> None:
        """Returns every layer to a reachable length, also layers that a failed pass left longer."""
        if self.states:
            self.checkpoints.restore(length)
        rows = self.index.truncate(length)
        for layer in self.stored:
            layer.truncate(min(layer.length, rows))
        self.saved_rows = min(self.saved_rows, rows)

    def select(self, rows: Sequence[int]) -> None:
        """Evicts every row that is not in `rows` (ascending indices of rows); positions stay.

        The remaining keys and values were computed with the evicted tokens in view, and stay influenced.

        Raises:
            ValueError: there are recurrent layers, which can't forget tokens.
        """
        if self.states:
            raise ValueError("a recurrent state can't forget tokens")
        chosen = torch.tensor(list(rows), dtype=torch.int64)
        for layer in self.stored:
            layer.select(chosen)
        self.index.select(rows)
        self.saved_rows = 0

    def reindex(self, index: TokenIndex) -> None:
        """Replaces the index after the keys were moved to other positions, or the rows read again.

        Raises:
            ValueError: it describes another number of rows.
        """
        if len(index.rows) != len(self) or len(index.positions) != len(self):
            raise ValueError(f"{len(index.rows)} rows don't describe {len(self)}")
        self.index = index
        self.saved_rows = 0

    def store_in(self, layers: Sequence[CacheLayerMixin | StateLayer]) -> None:
        """Converts keys and values into empty layers of another precision, layer by layer; states stay."""
        for number, (old, new) in enumerate(zip(self.layers, layers, strict=True)):
            if (
                isinstance(old, StoredLayer)
                and isinstance(new, StoredLayer)
                and not isinstance(old, StateLayer)
            ):
                convert(old, new)
                self.layers[number] = new
                old.reset()
        self.cache = Cache(layers=self.layers)  # type: ignore[arg-type]
        self.saved_rows = 0

    def unshare(self, tokens: int) -> int:
        """Copies shared memory that appending so many tokens would overwrite; returns the bytes copied."""
        return sum(layer.unshare(tokens) for layer in self.stored)

    def fork(self, length: int) -> "ConversationKV":
        """A cache of the first `length` tokens that shares this one's memory, copy-on-write.

        Raises:
            ValueError: this length is not `reachable`.
        """
        other = ConversationKV([layer.fork() if hasattr(layer, "fork") else layer for layer in self.layers])
        other.index = self.index.copy()
        other.checkpoints.copy_from(self.checkpoints)
        other.truncate(length)
        return other

    def clear(self) -> None:
        """Removes every token and frees the memory."""
        self.index = TokenIndex()
        self.checkpoints.clear()
        self.saved_rows = 0
        for layer in self.layers:
            layer.reset()
