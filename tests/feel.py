"""How the program feels, in figures: `python -m tests.feel` runs it in a pseudo-terminal on the real model.

Measures from outside, as a user would: first paint, engine ready, how long a typed character takes to show
with the engine idle and while it decodes on all cores, what an idle chat costs, and what the screen costs the
decode: tokens a second with it against `kvchat run` without. Medians and 95th percentiles.

`python -m tests.feel FOLDER decode` measures that last part alone.
"""

import fcntl
import json
import os
import pty
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from kvchat.store import Store

RUNS = 5
STORY = "Write a very long story about the sea, with many chapters."
STORY_TOKENS = 160
IDLE_S = 10.0
KEYS = "§¶†‡жщфюэяъыξψωλδθπφÞßðþæøłżźć"
"""Characters that no answer contains, so that seeing one means the key was echoed."""
BETWEEN_KEYS_S = 0.25
ROWS, COLUMNS = 44, 150


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


def decode_with_screen(folder: str, threads: int) -> tuple[float, float]:
    """(tokens a second of a long answer that streams onto the screen, cores that the screen took for it)."""
    with running(folder, "--threads", str(threads), "--max-tokens", str(STORY_TOKENS)) as terminal:
        terminal.wait_for("ready")
        terminal.send(STORY + "\r")
        terminal.wait_for("writing")
        began, cpu = time.perf_counter(), terminal.screen_cpu_s()
        terminal.wait_for("tok/s · cache", 300.0)
        share = (terminal.screen_cpu_s() - cpu) / (time.perf_counter() - began)
    store = Store(Path(folder) / "kvchat.db")
    answer = store.load(store.summaries()[0].id).messages[-1]
    assert answer.stats
    return answer.stats.decode_tok_s, share


def decode_without_screen(folder: str, threads: int) -> float:
    """The same answer, headless."""
    command = [sys.executable, "-m", "kvchat", "run", "--json", "--temperature", "0", "--data-dir", folder]
    flags = ["--threads", str(threads), "--max-tokens", str(STORY_TOKENS), STORY]
    done = subprocess.run(command + flags, capture_output=True, text=True, check=True)
    rate: float = json.loads(done.stdout)["stats"]["decode_tok_s"]
    return rate


def report_decode(folder: str) -> None:
    """What the screen costs the decode: with every core the model's, and with one left for the screen."""
    cores = psutil.cpu_count(logical=False) or 1
    for threads in sorted({cores, max(1, cores - 1)}, reverse=True):
        # in turns: whatever else slows the machine slows both
        pairs = [
            (decode_without_screen(folder, threads), decode_with_screen(folder, threads)) for _ in range(3)
        ]
        without = statistics.median(rate for rate, _ in pairs)
        with_screen = statistics.median(rate for _, (rate, _) in pairs)
        share = statistics.median(share for _, (_, share) in pairs)
        say(
            f"decode, {threads} thread{'s' * (threads > 1)}  {with_screen:.1f} tok/s with the screen, "
            f"{without:.1f} without: costs {1 - with_screen / without:.1%}; "
            f"the screen took {share:.1%} of a core"
        )


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
    if sys.argv[2:] == ["decode"]:
        report_decode(data_dir)
        return
    paints, readies = starts(data_dir)
    say(f"first paint   median {statistics.median(paints):.2f} s, slowest {max(paints):.2f} s")
    say(f"engine ready  median {statistics.median(readies):.2f} s, slowest {max(readies):.2f} s")
    with running(data_dir) as terminal:
        terminal.wait_for("ready")
        idle = echoes(terminal)
        say(f"key echo, idle      {spread(idle)}")
        terminal.send("\x7f" * len(KEYS))
        terminal.drain(2.0)
        before = terminal.cpu_s()
        terminal.drain(IDLE_S)
        say(f"idle                {1000 * (terminal.cpu_s() - before) / IDLE_S:.1f} ms of processor a second")
        terminal.send(STORY + "\r")
        terminal.wait_for("writing")
        terminal.drain(3.0)
        busy = echoes(terminal)
        say(f"key echo, decoding  {spread(busy)}")
    report_decode(data_dir)


if __name__ == "__main__":
    main()
