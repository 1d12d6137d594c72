"""The prompt: what is typed, how it is sent, and how what was sent before comes back."""

import pytest
from textual import events

from kvchat.ui.screens.dialogs import Confirm
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import ScriptedEngine


async def with_history(chat: Chat) -> None:
    """Two messages were sent."""
    await chat.ask("first")
    await chat.ask("second")


async def test_typing_and_enter_sends() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.press(*"Hi[0]", "enter")
        await chat.until(lambda: engine.requests, "the engine is asked")
        await chat.until_idle()
        assert engine.requests[0].messages[-1].text == "Hi[0]"
        assert chat.prompt.text == ""


@pytest.mark.parametrize("keys", [["enter"], ["space", "enter"], ["ctrl+j", "enter"]])
async def test_a_blank_prompt_is_not_sent(keys: list[str]) -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.press(*keys)
        assert engine.requests == []
        assert chat.questions() == []


@pytest.mark.parametrize("key", ["shift+enter", "ctrl+j", "alt+enter"])
async def test_a_line_break_does_not_send(key: str) -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.press("a", key, "b")
        assert chat.prompt.text == "a\nb"
        assert engine.requests == []
        await chat.press("enter")
        await chat.until(lambda: chat.questions() == ["a\nb"], "both lines are sent")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
async def test_pasted_lines_stay_lines(line_end: str) -> None:
    async with running() as chat:
        await chat.write(line_end.join(("one", "\ttwo", "", "three")))
        assert chat.prompt.text == "one\n\ttwo\n\nthree"


async def test_up_and_down_at_the_edges_walk_through_what_was_sent() -> None:
    async with running() as chat:
        await with_history(chat)
        await chat.write("my own")
        await chat.press("up")
        assert chat.prompt.text == "second"
        await chat.press("up")
        assert chat.prompt.text == "first"
        await chat.press("up")
        assert chat.prompt.text == "first"
        await chat.press("down", "down")
        assert chat.prompt.text == "my own"
        await chat.press("down")
        assert chat.prompt.text == "my own"


async def test_up_inside_several_lines_moves_the_cursor() -> None:
    async with running() as chat:
        await with_history(chat)
        await chat.press("a", "ctrl+j", "b", "up")
        assert chat.prompt.text == "a\nb"
        assert chat.prompt.cursor_location[0] == 0
        await chat.press("up")
        assert chat.prompt.text == "second"
        await chat.press("down")
        assert chat.prompt.text == "a\nb"


async def test_a_recalled_message_can_be_sent_again() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await with_history(chat)
        await chat.press("up", "up", "enter")
        await chat.until(lambda: len(engine.requests) == 3, "it is sent again")
        assert engine.requests[2].messages[-1].text == "first"
        await chat.until_idle()
        await chat.press("up")
        assert chat.prompt.text == "first"
        await chat.press("up")
        assert chat.prompt.text == "second"


async def test_the_own_draft_survives_an_answer_that_ends_while_an_old_message_is_shown() -> None:
    engine = ScriptedEngine().answers("ok")
    gate = engine.gate()
    engine.answers("Slow", gate)
    async with running(engine) as chat:
        await chat.ask("first")
        await chat.send("second")
        await chat.until_drawn("Slow")
        await chat.write("my own")
        await chat.press("up")
        assert chat.prompt.text == "second"
        gate.open()
        await chat.until_idle()
        await chat.press("down")
        assert chat.prompt.text == "my own"


async def test_history_goes_across_conversations_and_restarts() -> None:
    session = session_over()
    saved_conversation(session._store, ("user", "long ago"), ("assistant", "yes"))
    async with running(session=session) as chat:
        await chat.ask("of this one")
        await chat.press("ctrl+n", "up")
        assert chat.prompt.text == "of this one"
        await chat.press("up")
        assert chat.prompt.text == "long ago"
    async with running(session=session_over(session._store)) as chat:
        await chat.press("up", "up")
        assert chat.prompt.text == "long ago"


async def test_history_forgets_what_was_deleted_and_has_the_same_words_once() -> None:
    async with running() as chat:
        for text in ("twice", "once", "twice"):
            await chat.ask(text)
        await chat.press("up", "up")
        assert chat.prompt.text == "once"
        await chat.press("up")
        assert chat.prompt.text == "once"
        await chat.press("down", "down")
        await chat.send("/delete")
        await chat.dialog(Confirm)
        await chat.press("y")
        await chat.until(lambda: chat.session.conversations() == [], "it is deleted")
        await chat.press("up")
        await chat.pilot.pause()
        assert chat.prompt.text == ""


async def test_keys_typed_right_after_enter_stay_in_the_prompt() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.write("first")
        for key, character in [("enter", "\r"), *((c, c) for c in "next")]:
            chat.app.post_message(events.Key(key, character))
        await chat.until(lambda: engine.requests, "the engine is asked")
        await chat.until_idle()
        assert engine.requests[0].messages[-1].text == "first"
        await chat.until(lambda: chat.prompt.text == "next", "what was typed after Enter is there")
