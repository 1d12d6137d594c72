"""Response times of the screen: `python -m tests.perf.feel` runs the program in a pseudo-terminal.

Measures from outside, as a user would: first paint, engine ready, how long a typed character takes to show
with the engine idle, and while it reads or decodes on all cores, what an idle chat costs, and what the screen
costs the decode: tokens a second with it against `kvchat run` without. Medians and 95th percentiles.

`python -m tests.perf.feel FOLDER decode` measures that last part alone;
`python -m tests.perf.feel FOLDER scroll` measures how soon a conversation of
500 messages opens, and how it scrolls.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from kvchat.chat.store import Store
from tests.perf.scroll import LONG, report_scroll, save_conversations
from tests.perf.terminal import Terminal, running, say, spread

RUNS = 5
STORY = "Write a very long story about the sea, with many chapters."
STORY_TOKENS = 160
IDLE_S = 10.0
KEYS = "§¶†‡жщфюэяъыξψωλδθπφÞßðþæøłżźć"
"""Characters that no answer contains, so that seeing one means the key was echoed."""
BETWEEN_KEYS_S = 0.25


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


def echoes_while_reading(folder: str) -> list[float]:
    """Milliseconds until each of `KEYS` shows while 500 messages are read, of which nothing is cached."""
    save_conversations(folder)
    with running(folder, "-r", LONG) as terminal:
        terminal.wait_for("ready")
        terminal.drain(2.0)
        terminal.send("Go on.\r")
        terminal.drain(1.0)
        times = echoes(terminal)
        # Esc stops it, and the next question finds nothing cached again
        terminal.send("\x1b")
        terminal.wait_for("stopped")
        # what is left in the prompt would be there again the next time
        terminal.send("\x7f" * len(KEYS))
        terminal.drain(2.0)
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


def main() -> None:
    """Measures and reports."""
    data_dir = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    from kvchat.config.paths import find_paths
    from kvchat.models.resolve import is_prepared

    folder = is_prepared("smollm2-135m-instruct", find_paths().models)
    if folder is None:
        raise SystemExit("The model is not here yet: kvchat models pull")
    os.environ["KVCHAT_MODEL"] = str(folder)
    compiled = Path(data_dir) / "compiled"
    if find_paths().compiled.is_dir() and not compiled.is_dir():  # code is loaded from the data folder alone
        shutil.copytree(find_paths().compiled, compiled)
    if sys.argv[2:] == ["decode"]:
        report_decode(data_dir)
        return
    if sys.argv[2:] == ["scroll"]:
        with tempfile.TemporaryDirectory(dir=data_dir) as apart:  # no other conversation stands in its list
            report_scroll(apart)
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
    say(f"key echo, reading   {spread(echoes_while_reading(data_dir))}")
    report_decode(data_dir)


if __name__ == "__main__":
    main()
