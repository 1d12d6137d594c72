"""One measurement of `bench`, and how often measurements are repeated."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")
Note = Callable[[str], None]

ROW_S = 20.0
"""Default time limit for the repetitions of one row."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; fields that don't apply are None."""

    case: str
    context: int
    mode: str
    tok_s: float
    """Median over the runs."""
    runs: int = 1
    """Number of runs, or of decode steps, in the medians of this row."""
    ttft_s: float | None = None
    turn: int | None = None
    read_tokens: int | None = None
    kv_bytes: int | None = None
    kv: str | None = None
    """Precision of keys and values, if not the model's own."""
    weights: str | None = None
    """Precision of the weights, if not the model's own."""
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    restore_s: float | None = None
    """Part of `ttft_s`: reading the cache from disk and verifying it."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Repeats measurements within a time limit."""

    note: Note
    """Called with a description before each measurement."""
    row_s: float = ROW_S
    clock: Callable[[], float] = time.perf_counter

    def repeated(self, measure: Callable[[], Result], most: int) -> list[Result]:
        """The results of 1 to `most` runs; starts none that would probably end after `row_s`."""
        started = self.clock()
        results = [measure()]
        while len(results) < most:
            elapsed = self.clock() - started
            if elapsed + elapsed / len(results) > self.row_s:
                break
            results.append(measure())
        return results

    def warmed(self, measure: Callable[[], Result], most: int) -> list[Result]:
        """Like `repeated` after a warm-up run, which counts only if there is no time for another."""
        first, *rest = self.repeated(measure, most + 1)
        return rest or [first]
