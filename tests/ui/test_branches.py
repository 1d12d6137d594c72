"""Undo, edit, continue and fork: every way back into a conversation leaves what was there in the file."""

import pytest

from kvchat.chat.session import Session
from kvchat.contract import FinishReason, Fork
from kvchat.ui.screens.dialogs import AskLine
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import Fails, ScriptedEngine
from tests.ui.test_hostile import HOSTILE, WORST, assert_harmless

SIZES = [(60, 20), (100, 30), (160, 45)]
TALK = (("user", "One"), ("assistant", "Eins"), ("user", "Two"), ("assistant", "Zwei"))
BUSY = "An answer is still being written"


def held_before(*talk: tuple[str, str]) -> Session:
    """A session whose open conversation was held before."""
    session = session_over()
    session.open(saved_conversation(session._store, *(talk or TALK)).id)
    return session


def every_branch(chat: Chat) -> set[str]:
    return {m.text for m in chat.store._messages(chat.session.current.id)}


async def test_questions_are_numbered_in_the_transcript() -> None:
    async with running(session=held_before()) as chat:
        assert chat.numbers() == ["you · 1", "you · 2"]
        await chat.ask("Three")
        assert chat.numbers() == ["you · 1", "you · 2", "you · 3"]


async def test_numbers_count_from_the_first_question_where_only_the_end_is_mounted() -> None:
    talk = [(role, f"{role} {n}") for n in range(1, 101) for role in ("user", "assistant")]
    async with running(session=held_before(*talk)) as chat:
        assert (chat.numbers()[-1], chat.questions()[-1]) == ("you · 100", "user 100")
        await chat.send("/edit 3")
        await chat.until(lambda: chat.prompt.text == "user 3", "the third question is in the prompt")


# --- undo ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_undo_gives_the_question_back_and_keeps_its_branch(size: tuple[int, int]) -> None:
    async with running(session=held_before(), size=size) as chat:
        await chat.send("/undo")
        await chat.until(lambda: chat.prompt.text == "Two", "the question is in the prompt")
        assert chat.questions() == ["One"]
        assert chat.answers() == ["Eins"]
        assert [text for _, text, _ in chat.kept()] == ["One", "Eins"]
        assert every_branch(chat) == {"One", "Eins", "Two", "Zwei"}
        await chat.press(*"!", "enter")
        await chat.until_drawn("ok")
        assert [m.text for m in chat.engine.requests[0].messages] == ["One", "Eins", "Two!"]


async def test_undo_twice_empties_the_conversation_and_a_third_time_says_so() -> None:
    async with running(session=held_before()) as chat:
        for text, left in (("Two", ["One"]), ("One", [])):
            await chat.send("/undo")
            await chat.until(lambda n=text: chat.prompt.text == n, "it is in the prompt")  # type: ignore[misc]
            assert chat.questions() == left
            chat.prompt.text = ""
        await chat.send("/undo")
        await chat.until_said("no question to take back")


async def test_undo_comes_before_what_is_typed() -> None:
    async with running(session=held_before()) as chat:
        await chat.write(" and more")
        await chat.screen.run_action("run_command('undo')")
        assert chat.prompt.text == "Two and more"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_questions_come_back_and_can_be_edited(text: str) -> None:
    async with running(session=held_before(("user", text), ("assistant", text))) as chat:
        await chat.send("/edit 1")
        await chat.until_said("in the old one's place")
        assert_harmless(chat)
        await chat.press("escape")
        await chat.send("/undo")
        await chat.until(lambda: chat.questions() == [], "it is taken back")
        await chat.pilot.pause()
        assert_harmless(chat)
        assert every_branch(chat) == {text}


# --- edit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_edit_asks_another_question_in_the_place_of_an_earlier_one(size: tuple[int, int]) -> None:
    engine = ScriptedEngine().answers("Uno")
    async with running(engine, held_before(), size=size) as chat:
        await chat.send("/edit 1")
        await chat.until(lambda: chat.prompt.text == "One", "the question is in the prompt")
        assert chat.questions() == ["One", "Two"]
        await chat.press(*"!", "enter")
        await chat.until_drawn("Uno")
        await chat.until_idle()
        assert [m.text for m in engine.requests[0].messages] == ["One!"]
        assert chat.questions() == ["One!"]
        assert chat.answers() == ["Uno"]
        assert chat.numbers() == ["you · 1"]
        assert [text for _, text, _ in chat.kept()] == ["One!", "Uno"]
        assert every_branch(chat) == {"One", "Eins", "Two", "Zwei", "One!", "Uno"}
        await chat.ask("Next")
        assert [m.text for m in engine.requests[1].messages] == ["One!", "Uno", "Next"]


@pytest.mark.parametrize("command", ["/edit", "/edit 2"])
async def test_edit_without_a_number_takes_the_last_question(command: str) -> None:
    async with running(session=held_before()) as chat:
        await chat.send(command)
        await chat.until(lambda: chat.prompt.text == "Two", "the question is in the prompt")
        await chat.press("enter")
        await chat.until_drawn("ok")
        assert [m.text for m in chat.engine.requests[0].messages] == ["One", "Eins", "Two"]
        assert chat.answers() == ["Eins", "ok"]


@pytest.mark.parametrize("number", ["0", "3", "-1", "two", "1.0", "²", "9" * 5000, "[/b]", "1 2"])
@pytest.mark.parametrize("command", ["edit", "fork"])
async def test_what_is_no_number_of_a_question_is_refused(command: str, number: str) -> None:
    async with running(session=held_before()) as chat:
        before = chat.session.current.id
        await chat.send(f"/{command} {number}")
        await chat.until_said("Which question?")
        assert chat.prompt.text == ""
        assert chat.session.current.id == before
        assert chat.engine.acts == []
        await chat.ask("Three")
        assert chat.questions() == ["One", "Two", "Three"]


async def test_an_empty_conversation_has_no_question_to_edit() -> None:
    async with running() as chat:
        await chat.send("/edit")
        await chat.until_said("Which question?")


async def test_escape_leaves_the_edit_and_brings_the_draft_back() -> None:
    async with running(session=held_before()) as chat:
        await chat.write("my own")
        await chat.screen.run_action("run_command('edit')")
        await chat.until(lambda: chat.prompt.text == "Two", "the question is in the prompt")
        await chat.press("x", "escape")
        assert chat.prompt.text == "my own"
        await chat.press("enter")
        await chat.until_drawn("ok")
        assert chat.questions() == ["One", "Two", "my own"]


async def test_an_edit_ends_with_its_conversation() -> None:
    async with running(session=held_before()) as chat:
        await chat.send("/edit 1")
        await chat.until(lambda: chat.prompt.text == "One", "the question is in the prompt")
        await chat.press("ctrl+n")
        await chat.ask("Elsewhere")
        assert [m.text for m in chat.engine.requests[0].messages] == ["Elsewhere"]
        assert len(chat.session.conversations()) == 2


async def test_an_edit_that_came_too_early_is_still_an_edit_afterwards() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Drei", gate).answers("Uno")
    async with running(engine, held_before()) as chat:
        await chat.send("Three")
        await chat.until_drawn("Drei")
        await chat.send("/edit 1")
        await chat.until(lambda: chat.prompt.text == "One", "the question is in the prompt")
        await chat.press("enter")
        await chat.until_said(BUSY)
        assert chat.prompt.text == "One"
        gate.open()
        await chat.until_idle()
        await chat.press("enter")
        await chat.until_drawn("Uno")
        assert chat.questions() == ["One"]


# --- continue --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_continue_streams_after_the_old_text(size: tuple[int, int]) -> None:
    engine = ScriptedEngine().answers("Half an ", finish=FinishReason.LENGTH)
    gate = engine.gate()
    engine.answers("answ", gate, "er.")
    async with running(engine, size=size) as chat:
        await chat.ask("Go")
        await chat.send("/continue")
        await chat.until_reached(gate)
        await chat.until_drawn("Half an answ")
        assert chat.questions() == ["Go"]
        gate.open()
        await chat.until_idle()
        assert chat.answers() == ["Half an answer."]
        await chat.until_visible("Half an answer.")
        assert chat.kept() == [("user", "Go", None), ("assistant", "Half an answer.", "stop")]
        request = engine.requests[1]
        assert [(m.role, m.text) for m in request.messages] == [("user", "Go"), ("assistant", "Half an ")]
        await chat.screen.controller.opened()
        assert chat.answers() == ["Half an answer."]


async def test_a_continued_answer_is_whole_after_looking_elsewhere() -> None:
    engine = ScriptedEngine().answers("Half an ", finish=FinishReason.LENGTH)
    gate = engine.gate()
    engine.answers("answ", gate, "er.")
    async with running(engine) as chat:
        await chat.ask("Go")
        talk = chat.session.current.id
        await chat.send("/continue")
        await chat.until_reached(gate)
        await chat.press("ctrl+n")
        chat.session.open(talk)
        await chat.screen.controller.opened()
        await chat.until_drawn("Half an answ")
        gate.open()
        await chat.until_idle()
        assert chat.answers() == ["Half an answer."]
        assert chat.kept()[-1] == ("assistant", "Half an answer.", "stop")


async def test_stopping_a_continued_answer_loses_none_of_it() -> None:
    engine = ScriptedEngine().answers("Half", finish=FinishReason.LENGTH)
    gate = engine.gate()
    engine.answers(gate, "never")
    async with running(engine) as chat:
        await chat.ask("Go")
        await chat.send("/continue")
        await chat.until_reached(gate)
        await chat.press("escape")
        await chat.until_idle()
        assert chat.answers() == ["Half"]
        assert chat.kept()[-1] == ("assistant", "Half", "cancelled")


async def test_a_continued_answer_that_fails_stays_as_far_as_it_came() -> None:
    engine = ScriptedEngine().answers("Half", finish=FinishReason.LENGTH)
    engine.answers(" more", Fails("Out of memory."))
    async with running(engine) as chat:
        await chat.ask("Go")
        await chat.send("/continue")
        await chat.until_noticed("Out of memory.")
        assert chat.answers() == ["Half more"]
        assert chat.kept()[-1] == ("assistant", "Half more", "error")


@pytest.mark.parametrize(
    ("talk", "said"),
    [(TALK[:1], "no answer to go on with"), ((*TALK[:1], ("assistant", "Eins")), "ended this answer itself")],
)
async def test_an_answer_that_ended_or_is_not_there_is_not_gone_on_with(
    talk: tuple[tuple[str, str], ...], said: str
) -> None:
    async with running(session=held_before(*talk)) as chat:
        shown = chat.answers()
        await chat.send("/continue")
        await chat.until_said(said)
        assert chat.answers() == shown
        assert chat.engine.requests == []


# --- fork ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_fork_opens_a_conversation_and_the_engine_shares_the_cache(size: tuple[int, int]) -> None:
    async with running(session=held_before(), size=size) as chat:
        parent = chat.session.current.id
        await chat.send("/fork")
        await chat.until(lambda: chat.title() == "One (fork)", "the fork is open")
        child = chat.session.current.id
        assert chat.engine.acts == [Fork(parent, child)]
        assert chat.questions() == ["One", "Two"]
        assert chat.answers() == ["Eins", "Zwei"]
        await chat.ask("Only here")
        assert [m.text for m in chat.engine.requests[0].messages][-1] == "Only here"
        assert [m.text for m in chat.store.load(parent).messages] == ["One", "Eins", "Two", "Zwei"]
        assert chat.engine.requests[0].conversation == child


async def test_fork_with_a_number_goes_up_to_that_questions_answer() -> None:
    async with running(session=held_before()) as chat:
        await chat.send("/fork 1")
        await chat.until(lambda: chat.title() == "One (fork)", "the fork is open")
        assert (chat.questions(), chat.answers()) == (["One"], ["Eins"])


async def test_a_fork_up_to_a_question_without_an_answer_ends_with_the_question() -> None:
    async with running(session=held_before(*TALK, ("user", "Three"))) as chat:
        await chat.send("/fork 3")
        await chat.until(lambda: chat.title() == "One (fork)", "the fork is open")
        assert chat.questions() == ["One", "Two", "Three"]


async def test_a_fork_is_warm_at_once_and_the_draft_stays_with_its_parent() -> None:
    async with running() as chat:
        await chat.ask("One")
        parent = chat.session.current.id
        await chat.write("not sent")
        await chat.screen.run_action("run_command('fork')")
        await chat.until(lambda: [line[0] for line in chat.listed()] == ["●", "●"], "both are warm")
        assert chat.prompt.text == ""
        assert chat.store.draft(parent) == "not sent"


async def test_there_is_nothing_to_fork_before_the_first_message() -> None:
    async with running() as chat:
        await chat.send("/fork")
        await chat.until_said("nothing to fork")
        assert chat.engine.acts == []


async def test_a_hostile_title_is_forked_and_harmless() -> None:
    session = session_over()
    session.open(saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho"), title=WORST).id)
    async with running(session=session, toasts=True) as chat:
        await chat.send("/fork")
        await chat.until(lambda: len(chat.listed()) == 2, "it is forked")
        await chat.until_visible("This is the fork")
        assert_harmless(chat)
        await chat.send("/rename")
        await chat.dialog(AskLine)
        assert_harmless(chat)


@pytest.mark.parametrize("command", ["/undo", "/continue", "/fork", "/fork 1", "/regen"])
async def test_while_an_answer_streams_the_way_back_is_closed(command: str) -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Half", gate, " done")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        await chat.send(command)
        await chat.until_said(BUSY)
        assert chat.questions() == ["Go"]
        gate.open()
        await chat.until_idle()
        assert chat.answers() == ["Half done"]
        assert chat.kept() == [("user", "Go", None), ("assistant", "Half done", "stop")]
        assert len(chat.session.conversations()) == 1


@pytest.mark.parametrize("command", ["undo 3", "continue [/b]", "why x", "caches x", "help x", "new x"])
async def test_commands_without_an_argument_ignore_one(command: str) -> None:
    async with running(session=held_before()) as chat:
        await chat.send(f"/{command}")
        await chat.pilot.pause(0.05)
        assert chat.app._exception is None
        assert chat.engine.requests == []
