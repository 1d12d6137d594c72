"""The real program: in a pseudo-terminal, with an engine in a process of its own and a tiny model."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

from kvchat.chat.store import Store
from tests.ui.terminal import CTRL_Q, ENTER, F4, PATIENCE_S, Terminal

LEAVE_ALTERNATE_SCREEN, SHOW_CURSOR = b"\x1b[?1049l", b"\x1b[?25h"


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Waits until `condition` holds."""
    give_up = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < give_up, f"never came true: {what}"
        sleep(0.02)


@pytest.fixture
def chat(tiny_folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    """`kvchat` in a terminal; everything it keeps is in the test's folder."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("KVCHAT_", "TEXTUAL"))}
    env |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "XDG_CONFIG_HOME": str(tmp_path / "config")}
    command = [sys.executable, "-m", "kvchat", "-m", str(tiny_folder), "--data-dir", str(tmp_path / "data")]
    terminal = Terminal([*command, "--max-tokens", "6", "--temperature", "0", "--threads", "1"], env)
    yield terminal
    for child in psutil.Process(terminal.process.pid).children() if terminal.process.poll() is None else []:
        child.kill()
    terminal.close()


def engine_of(terminal: Terminal) -> psutil.Process:
    """The process that the model lives in: the one child that was spawned to serve."""
    children = psutil.Process(terminal.process.pid).children()
    (engine,) = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
    return engine


def imported(pid: int, logs: Path) -> set[str]:
    """The packages a living process has imported, as it says itself."""
    report = logs / f"report-{pid}.txt"
    os.kill(pid, signal.SIGUSR1)
    wait_for(report.exists, f"process {pid} reports")
    first, _, _ = report.read_text(encoding="utf-8").partition("\n")
    return set(first.removeprefix("packages: ").split())


def test_the_program_answers_survives_its_engine_and_leaves_the_terminal_as_it_was(
    chat: Terminal, tmp_path: Path
) -> None:
    chat.until("ready")
    engine = engine_of(chat)
    chat.type(b"Hello you" + ENTER)
    chat.until("tok/s · cache on")

    screen_packages = imported(chat.process.pid, tmp_path / "data" / "log")
    engine_packages = imported(engine.pid, tmp_path / "data" / "log")
    assert {"textual", "kvchat"} <= screen_packages
    assert not {"torch", "transformers"} & screen_packages
    assert {"torch", "transformers", "kvchat"} <= engine_packages
    assert "textual" not in engine_packages

    chat.type(F4)
    chat.until("cache turn · ready")

    killed = chat.now()
    engine.kill()
    chat.until("signal 9", since=killed)
    chat.until("ready", since=killed)
    assert engine_of(chat).pid != engine.pid
    chat.type(b"Still there?" + ENTER)
    chat.until("tok/s · cache turn", since=killed)

    second = engine_of(chat)
    left = chat.now()
    chat.type(CTRL_Q)
    assert chat.exit_code() == 0
    chat.until("Continue with: kvchat -r ", since=left)
    assert LEAVE_ALTERNATE_SCREEN in chat.raw[left:]
    assert SHOW_CURSOR in chat.raw[left:]
    assert chat.settings_now == chat.settings
    wait_for(lambda: not second.is_running(), "the engine is gone")

    store = Store(tmp_path / "data" / "kvchat.db")
    (summary,) = store.summaries()
    assert f"kvchat -r {summary.id}" in chat.text(left)
    messages = store.load(summary.id).messages
    assert [m.role for m in messages] == ["user", "assistant"] * 2
    assert [m.text for m in messages[::2]] == ["Hello you", "Still there?"]
    assert [m.stats.cache_mode for m in messages if m.stats] == ["on", "turn"]
    assert [m.finish_reason for m in messages[1::2]] == ["length", "length"]


def test_a_byte_that_is_no_text_is_replaced_and_sigterm_leaves_in_order(
    chat: Terminal, tmp_path: Path
) -> None:
    chat.until("ready")
    engine = engine_of(chat)
    chat.type(b"a\xffb\xc3")
    chat.type(b"\xa9" + ENTER)
    chat.until("tok/s · cache on")
    left = chat.now()
    chat.process.send_signal(signal.SIGTERM)
    assert chat.exit_code() == 128 + signal.SIGTERM
    wait_for(lambda: LEAVE_ALTERNATE_SCREEN in chat.raw[left:], "the screen is as before")
    assert b"\x1b[?1003l" in chat.raw[left:]
    assert chat.settings_now == chat.settings
    wait_for(lambda: not engine.is_running(), "the engine is gone")
    store = Store(tmp_path / "data" / "kvchat.db")
    (summary,) = store.summaries()
    assert store.load(summary.id).messages[0].text == "a\ufffdbé"


def test_a_killed_program_leaves_no_engine(chat: Terminal) -> None:
    chat.until("ready")
    engine = engine_of(chat)
    chat.process.kill()
    chat.exit_code()
    wait_for(lambda: not engine.is_running(), "the engine is gone")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("kvchat.ui.app", {"torch", "transformers", "kvchat.engine", "kvchat.cache"}),
        (
            "kvchat.cli.main",
            {"torch", "transformers", "textual", "kvchat.engine", "kvchat.cache", "kvchat.ui"},
        ),
        (
            "kvchat.engine_process.client",
            {"torch", "transformers", "textual", "kvchat.engine", "kvchat.cache", "kvchat.ui"},
        ),
        ("kvchat.engine.engine", {"textual", "kvchat.ui", "kvchat.chat.session", "kvchat.chat.store"}),
    ],
)
def test_importing_one_side_does_not_import_the_other(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert module in loaded
    assert not forbidden & loaded
