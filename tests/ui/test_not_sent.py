"""A turn that brings no answer: its text comes back into the prompt, and no later prompt has it."""

from pathlib import Path

import pytest

from kvchat.chat.answer_commands import begin_edit
from kvchat.chat.session import ConversationDefaults, Session
from kvchat.chat.store import Store
from kvchat.contract import EstimateCost
from kvchat.ui.widgets.message import UserMessage
from tests.support.screen_driver import Chat, running
from tests.support.scripted_engine import Fails, ScriptedEngine

KILLED = "The engine was killed (signal 9)."
TOO_LONG = Fails("This conversation is 9,000 tokens and the context holds 8,192.")


def heads(chat: Chat) -> list[str]:
    """What stands above each question."""
    return [str(block._who.content) for block in chat.screen.query(UserMessage)]


def asked(engine: ScriptedEngine) -> list[str]:
    """The texts of the last request."""
    return [message.text for message in engine.requests[-1].messages]


def priced(engine: ScriptedEngine) -> list[str]:
    """The texts of the turn whose price was asked last for what stands in the prompt."""
    prices = [act.request for act in engine.typed if isinstance(act, EstimateCost)]
    return [message.text for message in prices[-1].messages] if prices else []


async def lost(chat: Chat, text: str) -> None:
    """Asks a question that the engine refuses."""
    await chat.send(text)
    await chat.until_noticed(TOO_LONG.reason)
    await chat.until_idle()
    await chat.pilot.pause()


async def test_a_refused_message_is_marked_and_comes_back_and_the_next_prompt_lacks_it() -> None:
    engine = ScriptedEngine().answers("One.").answers(TOO_LONG).answers("Two.")
    async with running(engine) as chat:
        await chat.ask("First")
        await lost(chat, "A long one")
        assert heads(chat) == ["you · 1", "you · not sent"]
        assert chat.prompt.text == "A long one"
        await chat.until(lambda: priced(engine) == ["First", "One.", "A long one"], "its price is asked")
        chat.prompt.text = ""
        await chat.ask("Second")
        assert asked(engine) == ["First", "One.", "Second"]
        assert heads(chat) == ["you · 1", "you · not sent", "you · 2"]
        assert chat.questions() == ["First", "A long one", "Second"]


async def test_the_mark_is_there_after_a_restart_and_the_message_can_be_taken_back(tmp_path: Path) -> None:
    engine = ScriptedEngine().answers(TOO_LONG)
    store = Store(tmp_path / "kvchat.db")
    async with running(engine, Session(store, ConversationDefaults(model="scripted"))) as chat:
        await lost(chat, "A long one")
        chat.prompt.text = ""
        await chat.pilot.pause()
    later = Session(Store(tmp_path / "kvchat.db"), ConversationDefaults(model="scripted"))
    later.open_latest()
    engine = ScriptedEngine()
    async with running(engine, later) as chat:
        await chat.until(lambda: heads(chat) == ["you · not sent"], "the mark is there")
        chat.prompt.text = ""
        chat.screen.query_one(UserMessage).focus()
        await chat.press("e")
        await chat.until(lambda: chat.prompt.text == "A long one", "it is in the prompt")
        chat.prompt.text = ""
        await chat.ask("Short")
        assert asked(engine) == ["Short"]
        assert heads(chat) == ["you · not sent", "you · 1"]


async def test_what_was_typed_meanwhile_stays() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(gate, TOO_LONG)
    async with running(engine) as chat:
        await chat.send("A long one")
        await chat.until_reached(gate)
        await chat.write("and this")
        gate.open()
        await chat.until_idle()
        await chat.until(lambda: chat.prompt.text == "A long one\nand this", "both are in the prompt")


async def test_a_text_that_is_looked_at_in_the_prompt_stays_too() -> None:
    engine = ScriptedEngine().answers("One.")
    gate = engine.gate()
    engine.answers(gate, TOO_LONG)
    async with running(engine) as chat:
        await chat.ask("First")
        await chat.send("A long one")
        await chat.until_reached(gate)
        chat.prompt.recall(2)
        gate.open()
        await chat.until_idle()
        await chat.pilot.pause()
        assert chat.prompt.text == "First"
        chat.prompt.recall(0)
        assert chat.prompt.text == "A long one"


async def test_a_message_of_another_conversation_comes_back_into_its_draft() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(gate, TOO_LONG)
    async with running(engine) as chat:
        await chat.send("A long one")
        await chat.until_reached(gate)
        left = chat.session.current.id
        await chat.press("ctrl+n")
        await chat.write("elsewhere")
        gate.open()
        await chat.until_idle()
        await chat.pilot.pause()
        assert chat.prompt.text == "elsewhere"
        assert chat.store.draft(left) == "A long one"


async def test_leaving_before_the_first_token_keeps_the_text_as_the_draft(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(gate, "never")
    async with running(
        engine, Session(Store(tmp_path / "kvchat.db"), ConversationDefaults(model="scripted"))
    ) as chat:
        await chat.send("A question")
        await chat.until_reached(gate)
        left = chat.session.current.id
    store = Store(tmp_path / "kvchat.db")
    assert [(m.text, m.not_sent) for m in store.load(left).messages] == [("A question", True)]
    assert store.draft(left) == "A question"


async def test_an_edit_that_failed_brings_the_old_question_back_and_is_asked_in_its_place() -> None:
    engine = ScriptedEngine().answers("One.").answers("Two.").answers(TOO_LONG).answers("Three.")
    async with running(engine) as chat:
        await chat.ask("First")
        await chat.ask("Second")
        begin_edit(chat.screen.controller, chat.session.current.messages[0].id)
        chat.prompt.text = ""
        await lost(chat, "A long one")
        assert chat.questions() == ["First", "Second"]
        assert chat.answers() == ["One.", "Two."]
        assert chat.prompt.text == "A long one"
        chat.prompt.text = ""
        await chat.ask("Short")
        assert asked(engine) == ["Short"]
        assert chat.answers() == ["Three."]


async def test_an_answer_that_could_not_be_written_again_is_shown_again() -> None:
    engine = ScriptedEngine().answers("One.").answers(TOO_LONG)
    async with running(engine) as chat:
        await chat.ask("First")
        await chat.screen.run_action("run_command('regenerate')")
        await chat.until_noticed(TOO_LONG.reason)
        await chat.until_idle()
        await chat.until(lambda: chat.answers() == ["One."], "the answer is there")
        assert chat.prompt.text == ""
        await chat.ask("Second")
        assert asked(engine) == ["First", "One.", "Second"]


@pytest.mark.parametrize("again", ["/regen", "the prompt"])
async def test_after_a_death_the_message_is_sent_again(again: str) -> None:
    engine = ScriptedEngine().answers("One.")
    gate = engine.gate()
    engine.answers(gate).answers("Two.")
    async with running(engine) as chat:
        await chat.ask("First")
        await chat.send("Second")
        await chat.until_reached(gate)
        engine.die(KILLED)
        await chat.until_idle()
        await chat.until(lambda: chat.prompt.text == "Second", "it is in the prompt")
        await chat.until(lambda: "ready" in chat.status(), "the engine is there again")
        if again == "/regen":
            await chat.screen.run_action("run_command('regenerate')")
        else:
            await chat.press("enter")
        await chat.until(lambda: len(chat.answers()) == 2, "it is answered")
        await chat.until_idle()
        assert asked(engine) == ["First", "One.", "Second"]
        assert chat.prompt.text == ""


async def test_a_stop_before_the_first_token_keeps_the_question_with_an_empty_answer() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(gate, "never").answers("Two.")
    async with running(engine) as chat:
        await chat.send("First")
        await chat.until_reached(gate)
        await chat.press("escape")
        await chat.until_idle()
        assert chat.prompt.text == ""
        await chat.ask("Second")
        assert [(m.role, m.text) for m in engine.requests[-1].messages] == [
            ("user", "First"),
            ("assistant", ""),
            ("user", "Second"),
        ]


async def test_nothing_is_priced_and_no_map_is_asked_for_where_nothing_was_sent() -> None:
    engine = ScriptedEngine().answers(TOO_LONG)
    async with running(engine) as chat:
        await lost(chat, "A long one")
        assert chat.screen.controller.costs.next_turn() is None
        chat.prompt.text = ""
        await chat.send("/cache map")
        await chat.pilot.pause()
        assert not any(type(act).__name__ == "Inspect" for act in engine.acts)
