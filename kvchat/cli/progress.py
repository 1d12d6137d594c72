"""Progress of downloads and conversions: a bar on stderr, plain lines, or JSON lines for programs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import (
    Progress as Bar,
)
from rich.text import Text

from kvchat.models.staging import BYTES, Progress, Report
from kvchat.validation.plain_json import write_json


class _OnlyForBytes(ProgressColumn):
    """A column that is empty in stages that don't count bytes."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> Text:
        shown = self._column.render(task) if task.fields["bytes"] else Text("")
        return shown if isinstance(shown, Text) else Text(str(shown))


LINE_EVERY_S = 0.2
"""Least time between two JSON lines of one stage."""


@contextmanager
def reported(name: str, *, as_json: bool = False) -> Iterator[Report]:
    """Yields a function that displays progress: a bar on a terminal, one line per stage on a pipe.

    With `as_json` it prints `{"stage": …, "done": …, "total": …}` on stdout, one object per line.
    """
    if as_json:
        yield _json_lines()
        return
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _line_per_stage(name)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f} %"),
        _OnlyForBytes(DownloadColumn()),
        _OnlyForBytes(TransferSpeedColumn()),
        TimeRemainingColumn(compact=True),
    )
    with Bar(*columns, console=console) as bar:
        yield _bar_per_stage(bar, name)


def _bar_per_stage(bar: Bar, name: str) -> Report:
    tasks = {}

    def report(progress: Progress) -> None:
        stage = progress.stage
        if stage not in tasks:
            label = f"{name}: {progress.label}"
            tasks[stage] = bar.add_task(label, total=progress.total, bytes=stage in BYTES)
        bar.update(tasks[stage], completed=progress.done, total=progress.total)

    return report


def _json_lines() -> Report:
    last = ("", 0.0)

    def report(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.stage != last[0] or now - last[1] >= LINE_EVERY_S:
            last = (progress.stage, now)
            print(write_json(asdict(progress)), flush=True)  # noqa: T201

    return report


def _line_per_stage(name: str) -> Report:
    seen: set[str] = set()

    def report(progress: Progress) -> None:
        if progress.stage not in seen:
            seen.add(progress.stage)
            print(f"{name}: {progress.label} …", file=sys.stderr, flush=True)  # noqa: T201

    return report
