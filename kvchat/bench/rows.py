"""What one measurement of `bench` is, and how often it is repeated."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")
Note = Callable[[str], None]

ROW_S = 20.0
"""Time for the repetitions of one row, unless another is asked for."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; None where it doesn't apply."""

    case: str
    context: int
    mode: str
    tok_s: float
    """Median over the runs."""
    runs: int = 1
    """What the medians of this row are taken over: runs, or steps of one token."""
    ttft_s: float | None = None
    turn: int | None = None
    read_tokens: int | None = None
    kv_bytes: int | None = None
    kv: str | None = None
    """Precision of keys and values, where another than the model's own was asked for."""
    weights: str | None = None
    """Precision of the weights, where another than the model's own was asked for."""
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    restore_s: float | None = None
    """Of `ttft_s`, the time that reading the cache from disk and verifying it took."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Says which case is running, and repeats it for as long as a row may take."""

    note: Note
    row_s: float = ROW_S
    clock: Callable[[], float] = time.perf_counter

    def repeated(self, measure: Callable[[], Result], most: int) -> list[Result]:
        """What 1 to `most` runs gave: none is begun that would likely end after `row_s`."""
        started = self.clock()
        results = [measure()]
        while len(results) < most:
            passed = self.clock() - started
            if passed + passed / len(results) > self.row_s:
                break
            results.append(measure())
        return results

    def warmed(self, measure: Callable[[], Result], most: int) -> list[Result]:
        """The same after a run that warms up; where there is time for one only, that one counts."""
        first, *rest = self.repeated(measure, most + 1)
        return rest or [first]
