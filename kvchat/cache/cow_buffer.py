"""Memory whose rows are appended in place and shared by forks, until one of them would write over another.

It knows tensors by name and counts their rows; it refuses to know what stands in them.
"""

from collections.abc import Callable, Mapping
from weakref import WeakSet

import torch

from kvchat.cache.layer import Growth, bytes_of


class CowBuffer:
    """Tensors by name with one first dimension, whose rows are appended in place.

    Forks hold the same memory. A holder writes in place where no other one has rows, else it copies first.
    """

    def __init__(self, step: int, elsewhere: int = 0) -> None:
        """`step`: rows by which the memory grows, where so many of the first step are held elsewhere."""
        self.step = step
        self.elsewhere = elsewhere
        self.count = 0
        self.moves = 0
        """How often the memory became another one."""
        self._tensors: dict[str, torch.Tensor] = {}
        self._holders: WeakSet[CowBuffer] = WeakSet([self])
        self._storages: tuple[int, dict[int, int]] = 0, {}
        """What `storages` said, after so many moves."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """The rows in use of one tensor."""
        return self._tensors[name][: self.count]

    @property
    def filled(self) -> dict[str, torch.Tensor]:
        """The rows in use by name; nothing where nothing was ever written."""
        return {name: tensor[: self.count] for name, tensor in self._tensors.items()}

    @property
    def capacity(self) -> int:
        """Rows that fit before the memory has to grow."""
        return next((len(tensor) for tensor in self._tensors.values()), 0)

    def storages(self) -> dict[int, int]:
        """Address → bytes."""
        if self._storages[0] != self.moves:
            self._storages = self.moves, bytes_of(self._tensors.values())
        return self._storages[1]

    def rounded_up(self, rows: int) -> int:
        """`rows`, up to the next growth step; no rows take no memory."""
        return rows and -(-(rows + self.elsewhere) // self.step) * self.step - self.elsewhere

    def growth(self, start: int, end: int, row_bytes: int) -> Growth:
        """What writing the rows from `start` to `end` does to the memory."""
        if start == end or self._fits(start, end):
            return Growth()
        freed = sum(self.storages().values()) if len(self._holders) == 1 else 0
        return Growth(row_bytes * self.rounded_up(end), freed)

    def unshare(self, start: int, end: int) -> int:
        """Copies the rows in use where writing from `start` to `end` would overwrite another holder's rows.

        All `count` rows are copied, also those from `start` on: a caller may read them before it overwrites
        them. Returns the bytes copied.
        """
        if not self._tensors or not self._writes_over_others(start):
            return 0
        self._move(self.count, self.rounded_up(max(end, self.count)), {})
        return sum(tensor[: self.count].nbytes for tensor in self._tensors.values())

    def write(self, start: int, rows: Mapping[str, torch.Tensor]) -> None:
        """Keeps the first `start` rows and puts these after them."""
        new = len(next(iter(rows.values())))
        if not self._tensors or (new and not self._fits(start, start + new)):
            self._move(start, self.rounded_up(start + new), rows)
        self.count = start + new
        for name, tensor in self._tensors.items():
            tensor[start : self.count] = rows[name]

    def whole(self, name: str) -> torch.Tensor:
        """One tensor with its growth slack."""
        return self._tensors[name]

    def reserve(self, rows: int, like: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Makes room for so many rows after those in use, read by nobody else; a fresh one is as `like`."""
        if not self._tensors or not self._fits(self.count, self.count + rows):
            self._move(self.count, self.rounded_up(self.count + rows), self._tensors or like())

    def _fits(self, start: int, end: int) -> bool:
        return self.capacity >= end and not self._writes_over_others(start)

    def _writes_over_others(self, start: int) -> bool:
        return len(self._holders) > 1 and any(o.count > start for o in self._holders if o is not self)

    def _move(self, kept: int, capacity: int, like: Mapping[str, torch.Tensor]) -> None:
        """Into memory of its own; a fresh one takes shapes and dtypes from `like`."""
        like = self._tensors or like
        moved = {name: tensor.new_empty((capacity, *tensor.shape[1:])) for name, tensor in like.items()}
        for name, tensor in self._tensors.items():
            moved[name][:kept] = tensor[:kept]
        self._leave()
        self._tensors = moved

    def _leave(self) -> None:
        self.moves += 1
        self._tensors = {}
        self._holders.discard(self)
        self._holders = WeakSet([self])

    def select(self, index: torch.Tensor) -> None:
        """Keeps those rows, in memory of their own."""
        kept = {name: tensor[index] for name, tensor in self._tensors.items()}
        self.clear()
        if kept:
            self.write(0, kept)

    def clear(self) -> None:
        """Lets go of the memory."""
        self.count = 0
        self._leave()

    def fork(self) -> "CowBuffer":
        """Another holder of the same rows."""
        other = CowBuffer(self.step, self.elsewhere)
        other.count, other._tensors, other._holders = self.count, dict(self._tensors), self._holders
        other.moves = 1
        self._holders.add(other)
        return other
