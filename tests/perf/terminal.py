"""kvchat in a pseudo-terminal, measured from outside: what it prints, when, and what that costs."""

import fcntl
import os
import pty
import select
import statistics
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

ROWS, COLUMNS = 44, 150
NOTHING_S = 1.0
"""A key that prints nothing within this time does nothing."""
QUIET_S = 0.1
"""What a key causes is over when nothing is printed for this long."""


@dataclass(frozen=True, slots=True)
class Step:
    """What came of a key."""

    first_ms: float
    """Until something was printed."""
    settled_ms: float
    """Until nothing more was."""
    printed: str
    """With escape sequences; empty where nothing was."""


class Terminal:
    """kvchat in a pseudo-terminal; what it prints is read as bytes."""

    def __init__(self, folder: str, *flags: str) -> None:
        self.started = time.perf_counter()
        self._child, self._pty = pty.fork()
        if self._child == 0:
            os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
            os.execv(
                sys.executable,
                [
                    sys.executable,
                    "-m",
                    "kvchat",
                    "--temperature",
                    "0",
                    "--data-dir",
                    folder,
                    *(flags or ("--max-tokens", "2000")),
                ],
            )
        fcntl.ioctl(self._pty, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))

    def send(self, text: str) -> None:
        """Types."""
        os.write(self._pty, text.encode())

    def wait_for(self, text: str, seconds: float = 60.0) -> float:
        """Seconds until `text` is printed, from now on."""
        started, seen = time.perf_counter(), b""
        while text.encode() not in seen:
            left = seconds - (time.perf_counter() - started)
            if left <= 0 or not select.select([self._pty], [], [], left)[0]:
                raise SystemExit(f"{text!r} did not appear within {seconds:.0f} s")
            seen = seen[-200:] + os.read(self._pty, 65536)
        return time.perf_counter() - started

    def drain(self, seconds: float) -> None:
        """Reads and forgets what is printed in the next `seconds`."""
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            if select.select([self._pty], [], [], left)[0]:
                os.read(self._pty, 65536)

    def step(self, keys: str) -> Step:
        """What is printed after these keys."""
        began = last = time.perf_counter()
        first, printed, patience = 0.0, b"", NOTHING_S
        self.send(keys)
        while select.select([self._pty], [], [], max(0.0, last + patience - time.perf_counter()))[0]:
            printed += os.read(self._pty, 65536)
            last, patience = time.perf_counter(), QUIET_S
            first = first or last
        return Step(1000 * (first - began), 1000 * (last - began), printed.decode(errors="replace"))

    def screen_cpu_s(self) -> float:
        """Processor seconds of the process that draws, so far."""
        times = psutil.Process(self._child).cpu_times()
        return times.user + times.system

    def cpu_s(self) -> float:
        """Processor seconds of the program and its children so far."""
        program = psutil.Process(self._child)
        times = [p.cpu_times() for p in (program, *program.children(recursive=True))]
        return sum(t.user + t.system for t in times)

    def close(self) -> None:
        """Quits, and waits for the end."""
        self.send("\x11")
        try:
            while os.read(self._pty, 65536):
                pass
        except OSError:  # Linux says so when the other side is closed
            pass
        os.waitpid(self._child, 0)


@contextmanager
def running(folder: str, *flags: str) -> Iterator[Terminal]:
    """The program, from its start to its end."""
    terminal = Terminal(folder, *flags)
    try:
        yield terminal
    finally:
        terminal.close()


def spread(milliseconds: list[float]) -> str:
    """Median, the value that 95 % stay under, and the largest."""
    middle, most = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
    return f"median {middle:.0f} ms, 95th percentile {most:.0f} ms, worst {max(milliseconds):.0f} ms"


def say(words: str) -> None:
    """One line of the report."""
    sys.stdout.write(words + "\n")
    sys.stdout.flush()
