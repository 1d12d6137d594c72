"""Which tokens a cache has read, which of them it still stores, and at which positions they were read.

Integers only; must not import tensors.
"""

from collections.abc import Iterable, Sequence

from kvchat.cache.prefix import gap_bounds


class TokenIndex:
    """The tokens of one cache.

    A *row* is a token whose key and value are stored. An eviction removes rows and leaves `ids` as it is.
    Without evictions, row = token = position.
    """

    def __init__(
        self, ids: Iterable[int] = (), rows: Iterable[int] = (), positions: Iterable[int] = ()
    ) -> None:
        self.ids = list(ids)
        """Every token that was read, in order, evicted ones included."""
        self.rows = list(rows)
        """Which token of `ids` each row is; ascending."""
        self.positions = list(positions)
        """The position that each row's key carries."""

    @property
    def has_gap(self) -> bool:
        """Whether tokens were evicted from the middle."""
        return len(self.rows) != len(self.ids)

    @property
    def first_gap(self) -> int:
        """Tokens before the first evicted one."""
        return gap_bounds(self.rows, len(self.ids))[0]

    @property
    def last_gap_end(self) -> int:
        """The token after the last evicted one; 0 where none was evicted."""
        return gap_bounds(self.rows, len(self.ids))[1]

    @property
    def next_position(self) -> int:
        """The position of the next token."""
        return self.positions[-1] + 1 if self.positions else 0

    def append(self, ids: Sequence[int]) -> None:
        """Adds tokens, a row each, at the next positions."""
        first, position = len(self.ids), self.next_position
        self.ids.extend(ids)
        self.rows.extend(range(first, first + len(ids)))
        self.positions.extend(range(position, position + len(ids)))

    def truncate(self, length: int) -> int:
        """Keeps the first `length` tokens; returns how many rows are left."""
        rows = sum(1 for row in self.rows if row < length)
        del self.ids[length:], self.rows[rows:], self.positions[rows:]
        return rows

    def select(self, rows: Sequence[int]) -> None:
        """Keeps those rows (ascending indices of rows); their positions stay."""
        self.rows = [self.rows[row] for row in rows]
        self.positions = [self.positions[row] for row in rows]

    def copy(self) -> "TokenIndex":
        """An independent copy."""
        return TokenIndex(self.ids, self.rows, self.positions)
