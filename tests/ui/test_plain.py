"""`kvchat chat --plain`: line by line, with the same session, engine and slash words."""

import io
import re

import pytest

from kvchat.contract import CacheMode, Evicted, FinishReason, Miss, SetBudget
from kvchat.session import Session
from kvchat.ui.commands import COMMANDS
from kvchat.ui.plain import PlainChat, turn_sentence
from tests.ui.driving import saved_conversation, session_over
from tests.ui.scripted import Fails, ScriptedEngine, stats_of

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def talk(
    *lines: str, engine: ScriptedEngine | None = None, session: Session | None = None
) -> tuple[str, Session, ScriptedEngine]:
    """Types lines, then the input ends; returns what was written."""
    engine, session, out = engine or ScriptedEngine(), session or session_over(), io.StringIO()
    chat = PlainChat(
        session, engine.attach, "Scripted", io.StringIO("".join(f"{line}\n" for line in lines)), out
    )
    assert chat.run() == 0
    assert engine._state == "closed"
    return out.getvalue(), session, engine


def test_an_answer_is_text_and_its_figures_are_one_sentence() -> None:
    said, session, engine = talk("Hello there", engine=ScriptedEngine().answers("Good ", "day."))
    assert (
        "Scripted: Good day.\nReused 0 tokens, read 6, wrote 2; the first word came after 0.0 seconds, "
        in said
    )
    assert "the cache is on and holds 0.2 MB.\n" in said
    assert [m.text for m in session.current.messages] == ["Hello there", "Good day."]
    assert engine.requests[0].messages[0].text == "Hello there"


def test_nothing_that_a_model_says_reaches_the_terminal_but_text() -> None:
    said, _, _ = talk(
        "\x1b[31mHi", "/\x1b[2J", engine=ScriptedEngine().answers("a\x1b]0;t\x07b\x9b2J [/b]\r\n")
    )
    assert not CONTROL.search(said)
    assert "[/b]" in said


def test_every_command_does_something_or_says_that_it_belongs_to_the_screen() -> None:
    for command in COMMANDS:
        said, _, _ = talk("First", f"/{command.slash}", "no")
        assert len(said.splitlines()) > 3, command.name
    said, _, _ = talk("/panel", "/nothing")
    assert "/panel belongs to the screen" in said
    assert "There is no command /nothing. /help lists them." in said


def test_help_lists_every_command() -> None:
    said, _, _ = talk("/help")
    for command in COMMANDS:
        assert f"/{command.slash}" in said
        assert command.help in said


def test_the_cache_mode_new_conversations_and_going_back() -> None:
    engine = ScriptedEngine()
    said, session, _ = talk(
        "/cache off", "First", "/cache nonsense", "/new", "Second", "/sessions", engine=engine
    )
    assert engine.requests[0].mode is CacheMode.OFF
    assert engine.requests[1].mode is CacheMode.ON
    assert "on, turn and off; not nonsense" in said
    first = session.conversations()[-1]
    assert f"{first.id}: First, 2 messages" in said
    said, session, _ = talk(f"/sessions {first.id}", session=session)
    assert "“First”, 2 messages, goes on." in said
    assert session.current.id == first.id


def test_undo_edit_regenerate_continue_and_fork() -> None:
    engine = ScriptedEngine().answers("One").answers("Two").answers("Cut", finish=FinishReason.LENGTH)
    said, session, engine = talk(
        "First", "/regen", "/edit 1", "Anew", "/continue", "/fork", "/undo", "/edit 7", engine=engine
    )
    assert "It was: First. The next line is asked in its place." in said
    assert "The answer was cut at the longest answer allowed" in said
    assert "This is the fork" in said
    assert "Taken back: Anew" in said
    assert "Which question?" in said
    assert [r.messages[0].text for r in engine.requests] == ["First", "First", "Anew", "Anew"]
    assert len(session.conversations()) == 2


def test_prices_are_told_and_dear_acts_are_asked_about() -> None:
    miss = Miss("system prompt edited", 1100, 2.26)
    engine = ScriptedEngine().prices(2.4, miss)
    said, session, _ = talk("First", "/system Be brief.", "no", "/system Be kind.", "yes", engine=engine)
    assert "the next turn reads 1,204 tokens, about 2.4 s" in said
    assert "Nothing was changed." in said
    assert session.current.system_prompt == "Be kind."


def test_the_budget_is_set() -> None:
    said, _, engine = talk("/budget 512MB")
    assert SetBudget(512_000_000) in engine.acts
    assert "may take 512.0 MB" in said


def test_deleting_is_asked_about() -> None:
    said, session, engine = talk("First", "/delete", "no", "/delete", "yes")
    assert said.count("Delete “First” for good?") == 2
    assert session.conversations() == []
    assert len(engine.forgotten) == 1


def test_a_failed_turn_and_a_full_context_are_told() -> None:
    engine = (
        ScriptedEngine()
        .answers(Fails("No room."))
        .answers("The ", Evicted("", 5, "2 messages went", 2), "end")
    )
    said, session, _ = talk("First", "Second", engine=engine)
    assert "No room." in said
    assert "The context was full: 2 messages went." in said
    assert session.pending is None


def test_an_engine_that_never_comes_ends_it_with_the_reason() -> None:
    engine, out = ScriptedEngine(), io.StringIO()
    for _ in range(3):
        engine.dies_on_load("No memory.", "last words")
    chat = PlainChat(session_over(), engine.attach, "Scripted", io.StringIO(""), out)
    assert chat.run() == 1
    assert "No memory." in out.getvalue()
    assert "last words" in out.getvalue()


def test_a_conversation_that_goes_on_is_named() -> None:
    session = session_over()
    session.open(saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho"), title="Old").id)
    said, _, _ = talk("/exit", "never read", session=session)
    assert "“Old”, 2 messages, goes on." in said
    assert "never read" not in said


@pytest.mark.parametrize("finish", list(FinishReason))
def test_the_sentence_says_how_an_answer_ended(finish: FinishReason) -> None:
    _, _, engine = talk("Hello")
    said = turn_sentence(stats_of(engine.requests[0], 1, 2, finish, "edited"))
    assert said.startswith("Reused 1 token, read 4, wrote 2; ")
    assert ". Edited." in said
    assert ("The answer was" in said) is (finish is not FinishReason.STOP)
