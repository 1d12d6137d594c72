"""Measures how a conversation of 500 messages opens and scrolls; run by `python -m tests.perf.feel`."""

import re
import statistics
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from kvchat.chat.conversation import Conversation, Message
from kvchat.chat.store import Store
from tests.perf.terminal import COLUMNS, ROWS, Step, Terminal, running, say, spread
from tests.support.samples import FIGURES

QUESTIONS = 250
LONG, SHORT = "feel-long", "feel-short"
"""Ids of the two conversations."""
LAST_WORDS = "the last words"
"""Where the long one ends."""
OPENINGS = 5
WHEEL_TURNS = 300
PAGE_UP, PAGE_DOWN, LIST, ARROW_UP, ARROW_DOWN = "\x1b[5~", "\x1b[6~", "\x13", "\x1b[A", "\x1b[B"
WHEEL_UP = f"\x1b[<64;{COLUMNS // 2};{ROWS // 2}M"
PROSE = (
    "A cache keeps what was computed once, and *every* later token looks back at it. Where **one** token of "
    "the history differs, everything after it is read again; so the history is kept as `token ids`. "
)
ANSWERS = (
    f"{PROSE * 3}\n\n{PROSE * 2}",
    "## Steps\n\n1. Weigh the flour\n2. Warm the water\n   - not above 40 °C\n   - not below 20 °C\n"
    "3. Knead\n\n> Rest it.",
    "```python\ndef double(recipe: dict[str, float]) -> dict[str, float]:\n"
    '    """Twice as much of everything."""\n'
    "    return {name: 2 * grams for name, grams in recipe.items()}\n```\n\nCall it *once* only.",
    "キャッシュは一度計算したキーと値を保存します。次のトークンはそれを**すべて**参照します。"
    "\n\n- 読み直しは不要です\n- 速く答えます",
    "| pass | height | open |\n|---|---:|---|\n| Brenner | 1,370 m | all year |\n| Stelvio | 2,757 m | June |"
    f"\n\n{PROSE}",
)
"""What answers look like, in turns: prose, a list, code, a script without spaces, a table."""


def long_messages() -> Iterator[Message]:
    """Numbered questions and answers with figures."""
    ids = count(1)
    parent = None
    for number in range(1, QUESTIONS + 1):
        answer = ANSWERS[number % len(ANSWERS)] + (LAST_WORDS if number == QUESTIONS else "")
        for role, text in (("user", f"Question no. {number}: {PROSE}"), ("assistant", answer)):
            own = next(ids)
            answered = role == "assistant"
            yield Message(
                own,
                parent,
                role,
                text,
                f"2026-01-01T00:{own // 60:02}:{own % 60:02}+00:00",
                token_ids=tuple(range(300)) if answered else (),
                finish_reason="stop" if answered else None,
                stats=FIGURES if answered else None,
            )
            parent = own


def save_conversations(folder: str) -> None:
    """The long one and, used after it, a short one."""
    store = Store(Path(folder) / "kvchat.db")
    asked = Message(1, None, "user", "What is short?", "2026-01-02T00:00:00+00:00")
    store.import_all(
        [
            Conversation(LONG, "A long talk", messages=tuple(long_messages())),
            Conversation(SHORT, "A short talk", messages=(asked,)),
        ]
    )
    store.close()


def start_into(folder: str, conversation: str, words: str) -> float:
    """Milliseconds from the start of the program to the end of a conversation on the screen."""
    with running(folder, "-r", conversation) as terminal:
        terminal.wait_for(words)
        shown = 1000 * (time.perf_counter() - terminal.started)
        terminal.wait_for("ready")
    return shown


def open_neighbour(terminal: Terminal, arrow: str, words: str) -> float:
    """Milliseconds until the conversation above or below in the list is on the screen."""
    for key in (LIST, arrow):
        terminal.send(key)
        terminal.drain(0.5)
    terminal.send("\r")
    shown = 1000 * terminal.wait_for(words)
    terminal.drain(1.0)
    return shown


def steps(terminal: Terminal, keys: str, most: int = 10_000) -> list[Step]:
    """The same keys again and again, until they change nothing."""
    made: list[Step] = []
    while len(made) < most and (step := terminal.step(keys)).printed:
        made.append(step)
    return made


def questions_in(made: list[Step]) -> set[str]:
    """Numbers of the questions that were printed."""
    return {number for step in made for number in re.findall(r"Question no\. (\d+):", step.printed)}


def report_steps(name: str, made: list[Step], cpu_s: float) -> None:
    """What steps of one kind took."""
    say(f"{name}: {len(made)} steps, {1000 * cpu_s / len(made):.0f} ms of the screen's processor each")
    say(f"  first change  {spread([step.first_ms for step in made])}")
    say(f"  settled       {spread([step.settled_ms for step in made])}")


def report_scroll(folder: str) -> None:
    """Opens the long conversation in both ways, and goes through all of it."""
    save_conversations(folder)
    short, long = [], []
    for _ in range(OPENINGS):  # in turns: whatever else slows the machine slows both
        short.append(start_into(folder, SHORT, "What is short?"))
        long.append(start_into(folder, LONG, LAST_WORDS))
    say(f"start into one message   median {statistics.median(short):.0f} ms, slowest {max(short):.0f} ms")
    say(f"start into 500 messages  median {statistics.median(long):.0f} ms, slowest {max(long):.0f} ms")
    with running(folder, "-r", SHORT) as terminal:
        terminal.wait_for("ready")
        terminal.drain(1.0)
        shown = []
        for _ in range(OPENINGS):
            shown.append(open_neighbour(terminal, ARROW_DOWN, LAST_WORDS))
            open_neighbour(terminal, ARROW_UP, "What is short?")
    say(f"switch to 500 messages   median {statistics.median(shown):.0f} ms, slowest {max(shown):.0f} ms")
    with running(folder, "-r", LONG) as terminal:
        terminal.wait_for("ready")
        terminal.drain(2.0)
        seen: set[str] = set()
        for name, keys, most in (
            ("PageUp to the first message", PAGE_UP, 10_000),
            ("PageDown to the end", PAGE_DOWN, 10_000),
            ("mouse wheel up", WHEEL_UP, WHEEL_TURNS),
        ):
            before = terminal.screen_cpu_s()
            made = steps(terminal, keys, most)
            report_steps(name, made, terminal.screen_cpu_s() - before)
            seen |= questions_in(made)
        say(f"{len(seen)} of {QUESTIONS} questions were on the screen")
