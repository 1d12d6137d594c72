"""Quitting and coming back: what was not sent and what was not finished is still there."""

from pathlib import Path

import pytest

from kvchat.chat.session import UNSAVED, ConversationDefaults, Session
from kvchat.chat.store import Store
from tests.support.screen_driver import running, session_over
from tests.support.scripted_engine import ScriptedEngine


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "kvchat.db"


def reopened(database: Path) -> Session:
    """What the next start of the program sees."""
    return Session(Store(database), ConversationDefaults(model="scripted"))


async def test_quitting_in_mid_answer_keeps_what_there_is(database: Path) -> None:
    engine = ScriptedEngine()
    engine.answers("Half an ", engine.gate(), "answer")
    async with running(engine, session_over(Store(database))) as chat:
        await chat.send("Question")
        await chat.until_drawn("Half an ")
        await chat.press("ctrl+q")
    assert engine._state == "closed"
    messages = reopened(database).open_latest().messages
    assert [(m.role, m.text, m.finish_reason) for m in messages] == [
        ("user", "Question", None),
        ("assistant", "Half an ", "cancelled"),
    ]


async def test_the_partial_answer_of_another_conversation_is_kept_too(database: Path) -> None:
    engine = ScriptedEngine()
    engine.answers("Half an ", engine.gate(), "answer")
    async with running(engine, session_over(Store(database))) as chat:
        await chat.send("Question")
        await chat.until_drawn("Half an ")
        await chat.press("ctrl+n")
        await chat.press("ctrl+q")
    assert [m.text for m in reopened(database).open_latest().messages] == ["Question", "Half an "]


async def test_an_unsent_draft_is_there_after_coming_back(database: Path) -> None:
    async with running(session=session_over(Store(database))) as chat:
        await chat.ask("Question")
        await chat.write("Not\nsent")
        await chat.press("ctrl+q")
    session = reopened(database)
    session.open_latest()
    async with running(session=session) as chat:
        assert chat.prompt.text == "Not\nsent"
        assert chat.questions() == ["Question"]
        assert chat.answers() == ["ok"]
        await chat.press(*"!", "enter")
        await chat.until(lambda: chat.questions()[-1:] == ["Not\nsent!"], "it is sent")
        await chat.until_idle()
        await chat.press("ctrl+q")
    session = reopened(database)
    session.open_latest()
    assert session.draft() == ""


async def test_a_draft_without_a_conversation_is_there_after_coming_back(database: Path) -> None:
    async with running(session=session_over(Store(database))) as chat:
        await chat.write("Not sent")
        await chat.press("ctrl+q")
    assert Store(database).summaries() == []
    async with running(session=reopened(database)) as chat:
        assert chat.prompt.text == "Not sent"


async def test_every_conversation_has_its_own_draft() -> None:
    async with running() as chat:
        await chat.ask("First")
        first = chat.session.current.id
        await chat.write("of the first")
        await chat.press("ctrl+n")
        assert chat.prompt.text == ""
        await chat.write("of the new one")
        await chat.press("ctrl+s", "home", "enter")
        await chat.until(lambda: chat.session.current.id == first, "the first one is open")
        assert chat.prompt.text == "of the first"
        await chat.press("ctrl+n")
        assert chat.prompt.text == "of the new one"


async def test_a_draft_is_saved_without_quitting() -> None:
    async with running() as chat:
        await chat.write("Thinking about it")
        await chat.until(lambda: chat.store.draft(UNSAVED) == "Thinking about it", "the draft is saved")


async def test_a_message_that_was_sent_is_no_draft_of_the_next_conversation() -> None:
    async with running() as chat:
        await chat.write("Thought about for long")
        chat.screen.save_draft()
        await chat.press("enter")
        await chat.until(lambda: chat.questions(), "it is sent")
        await chat.until_idle()
        await chat.press("ctrl+n")
        assert chat.prompt.text == ""
