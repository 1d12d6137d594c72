"""Copy-on-write buffers: rows are appended in place, and forks share them until one would overwrite another.

Must not depend on what the rows contain.
"""

from collections.abc import Callable, Mapping
from weakref import WeakSet

import torch

from kvchat.cache.layer import Growth, bytes_of


class CowBuffer:
    """Named tensors with the same number of rows (first dimension).

    A fork writes in place after the last row that any fork uses; else it copies first.
    """

    def __init__(self, step: int, offset: int = 0) -> None:
        """`step`: rows by which the memory grows.

        `offset`: rows of the first growth step that are stored outside this buffer.
        """
        self.step = step
        self.offset = offset
        self.count = 0
        self.reallocations = 0
        """How often the tensors were replaced."""
        self._tensors: dict[str, torch.Tensor] = {}
        self._sharers: WeakSet[CowBuffer] = WeakSet([self])
        self._storages: tuple[int, dict[int, int]] = 0, {}
        """(`reallocations`, result of `storages` then)."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """The rows in use of one tensor."""
        return self._tensors[name][: self.count]

    @property
    def filled(self) -> dict[str, torch.Tensor]:
        """The rows in use by name; empty before the first write."""
        return {name: tensor[: self.count] for name, tensor in self._tensors.items()}

    @property
    def capacity(self) -> int:
        """Rows that fit before the memory has to grow."""
        return next((len(tensor) for tensor in self._tensors.values()), 0)

    def storages(self) -> dict[int, int]:
        """Address → bytes."""
        if self._storages[0] != self.reallocations:
            self._storages = self.reallocations, bytes_of(self._tensors.values())
        return self._storages[1]

    def rounded_up(self, rows: int) -> int:
        """`rows`, rounded up to the next growth step; 0 stays 0."""
        return rows and -(-(rows + self.offset) // self.step) * self.step - self.offset

    def growth(self, start: int, end: int, row_bytes: int) -> Growth:
        """What writing the rows from `start` to `end` allocates and frees."""
        if start == end or self._fits(start, end):
            return Growth()
        freed = sum(self.storages().values()) if len(self._sharers) == 1 else 0
        return Growth(row_bytes * self.rounded_up(end), freed)

    def unshare(self, start: int, end: int) -> int:
        """Copies the rows in use where writing from `start` to `end` would overwrite another fork's rows.

        All `count` rows are copied, since the caller may read those from `start` on before it overwrites
        them. Returns the bytes copied.
        """
        if not self._tensors or not self._overwrites_shared(start):
            return 0
        self._reallocate(self.count, self.rounded_up(max(end, self.count)), {})
        return sum(tensor[: self.count].nbytes for tensor in self._tensors.values())

    def write(self, start: int, rows: Mapping[str, torch.Tensor]) -> None:
        """Keeps the first `start` rows and writes these after them."""
        new = len(next(iter(rows.values())))
        if not self._tensors or (new and not self._fits(start, start + new)):
            self._reallocate(start, self.rounded_up(start + new), rows)
        self.count = start + new
        for name, tensor in self._tensors.items():
            tensor[start : self.count] = rows[name]

    def allocated(self, name: str) -> torch.Tensor:
        """One tensor with its growth slack."""
        return self._tensors[name]

    def reserve(self, rows: int, like: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Allocates so many unshared rows after those in use; before the first write, shaped as `like`."""
        if not self._tensors or not self._fits(self.count, self.count + rows):
            self._reallocate(self.count, self.rounded_up(self.count + rows), self._tensors or like())

    def _fits(self, start: int, end: int) -> bool:
        return self.capacity >= end and not self._overwrites_shared(start)

    def _overwrites_shared(self, start: int) -> bool:
        return len(self._sharers) > 1 and any(o.count > start for o in self._sharers if o is not self)

    def _reallocate(self, rows: int, capacity: int, like: Mapping[str, torch.Tensor]) -> None:
        """Copies the first `rows` into new memory; before the first write, `like` gives shapes and dtypes."""
        like = self._tensors or like
        copies = {name: tensor.new_empty((capacity, *tensor.shape[1:])) for name, tensor in like.items()}
        for name, tensor in self._tensors.items():
            copies[name][:rows] = tensor[:rows]
        self._detach()
        self._tensors = copies

    def _detach(self) -> None:
        self.reallocations += 1
        self._tensors = {}
        self._sharers.discard(self)
        self._sharers = WeakSet([self])

    def select(self, index: torch.Tensor) -> None:
        """Keeps those rows, copied into new memory."""
        rows = {name: tensor[index] for name, tensor in self._tensors.items()}
        self.clear()
        if rows:
            self.write(0, rows)

    def clear(self) -> None:
        """Frees the memory, unless a fork uses it."""
        self.count = 0
        self._detach()

    def fork(self) -> "CowBuffer":
        """Another buffer of the same rows in the same memory."""
        other = CowBuffer(self.step, self.offset)
        other.count, other._tensors, other._sharers = self.count, dict(self._tensors), self._sharers
        other.reallocations = 1
        self._sharers.add(other)
        return other
