"""The same events of the engine leave the same conversation, whichever front end they came to."""

import asyncio
import io
from contextlib import suppress

import pytest

from kvchat.chat.session import Session
from kvchat.cli.run import run_turns
from kvchat.contract import CacheMode, Evicted, FinishReason, PrefillProgress
from kvchat.errors import KvchatError
from kvchat.ui.plain.loop import PlainChat
from tests.support.screen_driver import MODEL, running, session_over
from tests.support.scripted_engine import Fails, ScriptedEngine, Step

SCRIPTS: dict[str, list[tuple[Step, ...]]] = {
    "answers": [("Good ", "day."), ("Yes.",)],
    "a failure in mid-answer": [("Good day.",), ("Half an ", Fails("No memory left.")), ("Whole.",)],
    "a failure before the answer": [("Good day.",), (Fails("Too long."),), ("Whole.",)],
    "a long prompt and an eviction": [(PrefillProgress("", 5, 10), "a", Evicted("", 5, "1 went", 1), "b")],
    "hostile text": [("\x1b[31mred\x9b2J </b>",)],
}
QUESTIONS = ("Hi\x1b[31m there", "And the second\u202e one?", "The third")

Left = tuple[list[tuple[str, str, str | None, bool]], dict[int, dict[str, int]], list[tuple[str, ...]]]


def left(session: Session, engine: ScriptedEngine) -> Left:
    """Messages, what the last turn did with them, and the texts of every request."""
    session.open(session.current.id)
    messages = [(m.role, m.raw, m.finish_reason, m.not_sent) for m in session.current.messages]
    statuses = {m: {str(status): n for status, n in c.items()} for m, c in session.last_turn.items()}
    return messages, statuses, [tuple(m.text for m in request.messages) for request in engine.requests]


def scripted(turns: list[tuple[Step, ...]]) -> ScriptedEngine:
    engine = ScriptedEngine()
    for number, steps in enumerate(turns):
        engine.answers(*steps, finish=FinishReason.LENGTH if number else FinishReason.STOP)
    return engine


async def on_screen(name: str, mode: CacheMode) -> Left:
    engine, session = scripted(SCRIPTS[name]), session_over(mode=mode)
    async with running(engine, session) as chat:
        for question in QUESTIONS[: len(SCRIPTS[name])]:
            chat.prompt.text = ""
            await chat.ask(question)
        return left(session, engine)


def in_lines(name: str, mode: CacheMode) -> Left:
    engine, session = scripted(SCRIPTS[name]), session_over(mode=mode)
    lines = io.StringIO("".join(f"{question}\n" for question in QUESTIONS[: len(SCRIPTS[name])]))
    assert PlainChat(session, engine.attach, MODEL, lines, io.StringIO()).run() == 0
    return left(session, engine)


def headless(name: str, mode: CacheMode) -> Left:
    engine, session = scripted(SCRIPTS[name]), session_over(mode=mode)
    engine.start()
    for question in QUESTIONS[: len(SCRIPTS[name])]:
        with suppress(KvchatError):
            run_turns(session, engine, [question], as_json=False)
    return left(session, engine)


@pytest.mark.parametrize("mode", [CacheMode.ON, CacheMode.OFF])
@pytest.mark.parametrize("name", SCRIPTS)
async def test_screen_plain_mode_and_run_leave_the_same(name: str, mode: CacheMode) -> None:
    screen = await on_screen(name, mode)
    # in a thread: plain mode has a loop of its own
    plain, run = [await asyncio.to_thread(other, name, mode) for other in (in_lines, headless)]
    assert screen[0]
    assert screen[1]
    assert screen == plain == run
