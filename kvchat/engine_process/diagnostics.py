"""Diagnostics of a running process: `kill -USR1 PID` writes `report-PID.txt` into the log folder.

The report lists the imported packages and the stack of every thread.
"""

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from kvchat.system.ownership import make_private


def report_on_signal(folder: Path) -> None:
    """Installs the signal handler, if the system has SIGUSR1. Call from the main thread."""
    if not hasattr(signal, "SIGUSR1"):
        return

    def write(_signal: int, _frame: FrameType | None) -> None:
        make_private(folder)
        partial = folder / f"report-{os.getpid()}.partial"
        partial.write_text(_report(), encoding="utf-8")
        partial.rename(partial.with_suffix(".txt"))

    signal.signal(signal.SIGUSR1, write)


def _report() -> str:
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    stacks = ["".join(traceback.format_stack(frame)) for frame in sys._current_frames().values()]
    return f"packages: {' '.join(packages)}\n\n" + "\n".join(stacks)
