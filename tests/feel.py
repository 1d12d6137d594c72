"""How the program feels, in figures: `python -m tests.feel` runs it in a pseudo-terminal on the real model.

Measures from outside, as a user would: first paint, engine ready, and how long a typed character takes to
show, with the engine idle and while it decodes on all cores. Medians and 95th percentiles.
"""

import fcntl
import os
import pty
import select
import statistics
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

RUNS = 5
KEYS = "§¶†‡жщфюэяъыξψωλδθπφÞßðþæøłżźć"
"""Characters that no answer contains, so that seeing one means the key was echoed."""
BETWEEN_KEYS_S = 0.25
ROWS, COLUMNS = 44, 150


class Terminal:
    """kvchat in a pseudo-terminal; what it prints is read as bytes."""

    def __init__(self, folder: str) -> None:
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
                    "--max-tokens",
                    "2000",
                    "--data-dir",
                    folder,
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
def running(folder: str) -> Iterator[Terminal]:
    """The program, from its start to its end."""
    terminal = Terminal(folder)
    try:
        yield terminal
    finally:
        terminal.close()


def starts(folder: str) -> tuple[list[float], list[float]]:
    """(first paint, engine ready) of several starts, in seconds."""
    paints, readies = [], []
    for _ in range(RUNS):
        with running(folder) as terminal:
            terminal.wait_for("conversations")
            paints.append(time.perf_counter() - terminal.started)
            terminal.wait_for("ready")
            readies.append(time.perf_counter() - terminal.started)
    return paints, readies


def echoes(terminal: Terminal) -> list[float]:
    """Milliseconds until each of `KEYS` shows."""
    times = []
    for key in KEYS:
        terminal.drain(BETWEEN_KEYS_S)
        terminal.send(key)
        times.append(terminal.wait_for(key) * 1000)
    return times


def spread(milliseconds: list[float]) -> str:
    """Median, and the value that 95 % stay under."""
    worst = statistics.quantiles(milliseconds, n=20)[-1]
    return f"median {statistics.median(milliseconds):.0f} ms, 95th percentile {worst:.0f} ms"


def say(words: str) -> None:
    """One line of the report."""
    sys.stdout.write(words + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measures and reports."""
    data_dir = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    from kvchat.locate import is_prepared
    from kvchat.paths import find_paths

    folder = is_prepared("smollm2-135m-instruct", find_paths().models)
    if folder is None:
        raise SystemExit("The model is not here yet: kvchat models pull")
    os.environ["KVCHAT_MODEL"] = str(folder)
    paints, readies = starts(data_dir)
    say(f"first paint   median {statistics.median(paints):.2f} s, slowest {max(paints):.2f} s")
    say(f"engine ready  median {statistics.median(readies):.2f} s, slowest {max(readies):.2f} s")
    with running(data_dir) as terminal:
        terminal.wait_for("ready")
        idle = echoes(terminal)
        say(f"key echo, idle      {spread(idle)}")
        terminal.send("\x7f" * len(KEYS) + "Write a very long story about the sea, with many chapters.\r")
        terminal.wait_for("writing")
        terminal.drain(3.0)
        busy = echoes(terminal)
        say(f"key echo, decoding  {spread(busy)}")


if __name__ == "__main__":
    main()
