"""Reading a conversation: a window over many messages, walking over them by key, and taking text out."""

import re
from asyncio import gather

import pyperclip
import pytest
from textual.widgets import Static

from kvchat.chat.session import Session
from kvchat.ui import clipboard as system
from kvchat.ui.widgets.markdown import MarkdownText
from kvchat.ui.widgets.message import AnswerMessage, MessageBlock, UserMessage
from kvchat.ui.widgets.transcript import MOUNTED_AT_MOST, SHOWN_AT_ONCE, EarlierMessages, LaterMessages
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import Fails, ScriptedEngine
from tests.ui.test_hostile import HOSTILE, assert_harmless

CODE = "Two ways:\n\n```python\nprint(1)\n```\n\nor\n\n```sh\nls\n```\n"


def held_before(*talk: tuple[str, str]) -> Session:
    """A session whose open conversation was held before."""
    session = session_over()
    session.open(saved_conversation(session._store, *talk).id)
    return session


def long_talk(questions: int, lines: int = 1) -> Session:
    """A conversation of numbered messages."""
    talk = [
        (role, "\n\n".join(f"{role} {n}, line {line}" for line in range(lines)))
        for n in range(questions)
        for role in ("user", "assistant")
    ]
    return held_before(*talk)


def places(chat: Chat) -> list[int]:
    """Which messages are mounted."""
    return [block.place for block in chat.transcript.query(MessageBlock)]


def unmounted(chat: Chat) -> tuple[str, str]:
    """What is said of the messages before and after."""
    ends = (chat.transcript.query_one(EarlierMessages), chat.transcript.query_one(LaterMessages))
    before, after = (str(end.content) if end.display else "" for end in ends)
    return before, after


def focused(chat: Chat) -> int | None:
    """Place of the message that has the focus."""
    block = chat.app.focused
    return block.place if isinstance(block, MessageBlock) else None


async def walk(chat: Chat, key: str, place: int) -> None:
    """A key gives a message the focus."""
    await chat.press(key)
    await chat.until(lambda: focused(chat) == place, f"message {place} has the focus")


async def at_top(chat: Chat, place: int) -> None:
    """Waits until a message has the focus and stands on the screen."""
    await chat.until(lambda: focused(chat) == place, f"message {place} has the focus")
    await chat.pilot.pause()


# --- many messages ---------------------------------------------------------------------------------------


async def test_a_long_conversation_opens_at_its_end_with_few_messages_mounted() -> None:
    async with running(session=long_talk(250, lines=4)) as chat:
        await chat.until_visible("assistant 249, line 3")
        assert SHOWN_AT_ONCE <= len(places(chat)) <= MOUNTED_AT_MOST
        assert places(chat)[-1] == 499
        assert unmounted(chat) == (f"▲ {places(chat)[0]} earlier messages", "")


async def test_scrolling_up_brings_every_message_once_and_in_order() -> None:
    async with running(session=long_talk(30, lines=4)) as chat:
        await chat.until_visible("assistant 29, line 3")
        seen = set(places(chat))
        while 0 not in seen:
            top = places(chat)[0]
            chat.transcript.scroll_relative(y=-20, animate=False)
            await chat.pilot.pause(0.02)
            assert places(chat) == list(range(places(chat)[0], places(chat)[-1] + 1))
            assert len(places(chat)) <= MOUNTED_AT_MOST
            assert places(chat)[0] <= top
            seen |= set(places(chat))
        assert seen == set(range(60))
        assert unmounted(chat)[0] == ""


async def test_what_is_read_stays_in_its_place_when_messages_come_above_it() -> None:
    async with running(session=long_talk(60, lines=4)) as chat:
        await chat.until_visible("assistant 59, line 3")
        transcript = chat.transcript
        transcript.scroll_relative(y=-5, animate=False)
        await chat.pilot.pause(0.05)
        before = chat.visible()
        top = places(chat)[0]
        await transcript.show_earlier()
        await chat.pilot.pause(0.05)
        assert places(chat)[0] < top
        text = [line[34:76] for line in chat.visible().splitlines()]
        assert text == [line[34:76] for line in before.splitlines()]


async def settled(chat: Chat) -> str:
    """The visible text, once it has stopped changing."""
    before = ""
    while (now := chat.visible()) != before:
        before = now
        await chat.pilot.pause(0.05)
    return now


@pytest.mark.parametrize("rows", [30, 90])
async def test_pages_show_every_message_on_the_way_up_and_down(rows: int) -> None:
    async with running(session=long_talk(60, lines=3), size=(116, rows)) as chat:
        await chat.until_visible("assistant 59, line 2")
        for pages, last in ((-1, "user 0, line 2"), (1, "assistant 59, line 2")):
            seen: set[str] = set()
            while last not in seen:
                seen |= set(re.findall(r"(?:user|assistant) \d+, line \d", await settled(chat)))
                chat.transcript.scroll_page(pages)
                await chat.pilot.pause(0.05)
            assert len(seen) == 120 * 3


async def test_scrolling_on_at_the_end_of_what_is_mounted_does_not_follow_the_end() -> None:
    async with running(session=long_talk(60, lines=3)) as chat:
        await chat.transcript.go_to(10)
        await chat.until_visible("user 5, line 0")
        chat.transcript.scroll_to(y=chat.transcript.max_scroll_y, animate=False, immediate=True)
        read = chat.transcript._in_view()
        assert read
        await chat.pilot.pause(0.1)
        assert chat.transcript._in_view() is read


async def test_what_is_no_longer_mounted_keeps_nothing_that_was_drawn() -> None:
    async with running(session=long_talk(60, lines=3)) as chat:
        await chat.until_visible("assistant 59, line 2")
        gone = list(chat.transcript.query(MarkdownText))
        assert any(each._styles_cache._cache for each in gone)
        await chat.transcript.go_to(0)
        await chat.pilot.pause()
        assert not any(each.is_attached or each._settled or each._last for each in gone)
        assert not any(each._styles_cache._cache for each in gone)


async def test_home_goes_to_the_first_message_and_end_follows_the_last_one() -> None:
    async with running(session=long_talk(100, lines=3)) as chat:
        await chat.press("tab", "home")
        await at_top(chat, 0)
        await chat.until_visible("user 0, line 0")
        assert len(places(chat)) <= MOUNTED_AT_MOST
        assert unmounted(chat)[1] == f"▼ {200 - places(chat)[-1] - 1} later messages"
        await chat.press("end")
        await chat.until_visible("assistant 99, line 2")
        await chat.ask("more")
        await chat.until_visible("ok")


async def test_a_question_asked_while_old_messages_are_read_comes_to_the_end() -> None:
    engine = ScriptedEngine().answers("The answer.")
    async with running(engine, long_talk(100)) as chat:
        await chat.transcript.go_to(3)
        await chat.ask("Now this")
        await chat.until_visible("The answer.")
        assert places(chat)[-2:] == [200, 201]
        assert chat.numbers()[-1] == "you · 101"
        assert len(engine.requests[0].messages) == 201
        await chat.send("/regen")
        await chat.until(lambda: chat.answers()[-1] == "ok", "it is written again")
        await chat.until_idle()
        assert places(chat)[-2:] == [200, 201]


async def test_scrolling_jumping_and_asking_at_once_mix_nothing_up() -> None:
    async with running(session=long_talk(100, lines=4)) as chat:
        await chat.until_visible("assistant 99, line 3")
        transcript = chat.transcript
        for _ in range(3):
            await transcript.go_to(50)
            await gather(transcript.show_earlier(), transcript.show_end(), transcript.show_later())
            await gather(transcript.show_earlier(), transcript.go_to(7), transcript.notice("Said."))
            await chat.pilot.pause()
            assert places(chat) == list(range(places(chat)[0], places(chat)[-1] + 1))
        await chat.ask("Still there?")
        assert places(chat)[-2:] == [200, 201]


async def test_an_answer_goes_on_while_older_messages_are_read() -> None:
    engine = ScriptedEngine()
    gates = [engine.gate(), engine.gate()]
    engine.answers("One", gates[0], " two", gates[1], " three")
    async with running(engine, long_talk(60, lines=3)) as chat:
        await chat.send("CountTokens")
        await chat.until_drawn("One")
        await chat.transcript.go_to(2)
        assert 121 not in places(chat)
        gates[0].open()
        await chat.until_reached(gates[1])
        await chat.press("end")
        await chat.until_drawn("One two")
        assert places(chat)[-1] == 121
        await chat.transcript.go_to(2)
        gates[1].open()
        await chat.until_idle()
        await chat.press("tab", "end")
        await chat.until_drawn("One two three")
        assert places(chat)[-2:] == [120, 121]
        assert "wrote 3" in chat.notes()[-1]


async def test_an_answer_that_fails_while_older_messages_are_read() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(gate, Fails("No memory."))
    async with running(engine, long_talk(60, lines=3)) as chat:
        await chat.send("CountTokens")
        await chat.until_reached(gate)
        await chat.transcript.go_to(2)
        gate.open()
        await chat.until_idle()
        await chat.until_noticed("No memory.")
        await chat.ask("Again")
        assert chat.answers()[-1] == "ok"


async def test_a_conversation_that_grows_keeps_few_messages_mounted() -> None:
    async with running() as chat:
        for n in range(MOUNTED_AT_MOST // 2 + 3):
            await chat.ask(f"question {n}")
        assert len(places(chat)) <= MOUNTED_AT_MOST + 2
        assert places(chat)[-1] == len(chat.session.current.messages) - 1
        await chat.transcript.go_to(0)
        await chat.until_visible("question 0")


# --- walking ---------------------------------------------------------------------------------------------


async def test_tab_goes_to_the_last_message_and_up_and_down_walk() -> None:
    async with running(session=long_talk(3)) as chat:
        await walk(chat, "tab", 5)
        for key, place in (("up", 4), ("up", 3), ("k", 2), ("down", 3), ("j", 4), ("down", 5)):
            await walk(chat, key, place)
        await chat.press("down")
        await chat.until(lambda: chat.prompt.has_focus, "the prompt has the focus")
        await walk(chat, "tab", 5)
        await chat.press("escape")
        await chat.until(lambda: chat.prompt.has_focus, "the prompt has the focus")


async def test_tab_without_messages_stays_in_the_prompt() -> None:
    async with running() as chat:
        await chat.press("a", "tab", "b")
        assert chat.prompt.text == "ab"


async def test_up_scrolls_through_a_message_that_is_higher_than_the_screen() -> None:
    session = held_before(("user", "Go"), ("assistant", "\n\n".join(f"line {n}" for n in range(60))))
    async with running(session=session) as chat:
        await chat.press("tab")
        assert focused(chat) == 1
        before = chat.transcript.scroll_y
        await chat.press("up")
        await chat.until(lambda: 0 < chat.transcript.scroll_y < before, "it scrolls")
        assert focused(chat) == 1
        while focused(chat) == 1:
            await chat.press("up")
        assert focused(chat) == 0


async def test_walking_up_brings_messages_that_were_not_mounted() -> None:
    async with running(session=long_talk(30)) as chat:
        await walk(chat, "tab", 59)
        walked = [59]
        while walked[-1] > 0:
            await chat.press("up")
            await chat.pilot.pause(0.02)
            if (place := focused(chat)) is not None and place != walked[-1]:
                walked.append(place)
        assert walked == list(range(59, -1, -1))
        await chat.until_visible("user 0, line 0")


async def test_what_is_typed_on_a_message_goes_into_the_prompt() -> None:
    async with running(session=long_talk(1)) as chat:
        await chat.press("tab", *"What")
        assert chat.prompt.has_focus
        assert chat.prompt.text == "What"


async def test_page_up_and_page_down_scroll_from_the_prompt() -> None:
    async with running(session=long_talk(20, lines=4)) as chat:
        await chat.until_visible("assistant 19, line 3")
        await chat.press("pageup")
        await chat.until(lambda: "assistant 19, line 3" not in chat.visible(), "it scrolled up")
        assert chat.prompt.has_focus
        await chat.press("pagedown", "pagedown", "pagedown", "pagedown")
        await chat.until_visible("assistant 19, line 3")


async def test_e_edits_the_focused_question_and_f_forks_at_it() -> None:
    async with running(session=long_talk(3)) as chat:
        for key, place in (("tab", 5), ("up", 4), ("up", 3), ("up", 2)):
            await walk(chat, key, place)
        await chat.press("e")
        await chat.until(lambda: chat.prompt.text == "user 1, line 0", "the question is in the prompt")
        await chat.press("escape")
        for key, place in (("tab", 5), ("up", 4), ("up", 3)):
            await walk(chat, key, place)
        await chat.press("f")
        await chat.until(lambda: "(fork)" in chat.title(), "the fork is open")
        await chat.until(lambda: chat.answers()[-1:] == ["assistant 1, line 0"], "it ends there")


# --- long questions --------------------------------------------------------------------------------------


async def test_a_long_question_is_folded_until_enter_unfolds_it() -> None:
    text = "\n".join(f"line {n}" for n in range(3000))
    async with running(session=held_before(("user", text), ("assistant", "Long."))) as chat:
        question = chat.transcript.query_one(UserMessage)
        assert chat.questions() == ["\n".join(f"line {n}" for n in range(20))]
        await chat.until_visible("28,740 more characters, 3,000 lines")
        await chat.press("tab", "up", "enter")
        await chat.until(lambda: chat.questions() == [text], "it is unfolded")
        await chat.press("enter")
        await chat.until(lambda: len(chat.questions()[0]) < 1000, "it is folded again")
        assert question.text == text


# --- copying ---------------------------------------------------------------------------------------------


async def test_y_copies_the_focused_message(clipboard: list[str]) -> None:
    async with running(session=held_before(("user", "Which?"), ("assistant", "The **Brenner**."))) as chat:
        await chat.press("tab", "y")
        assert (clipboard, chat.app.clipboard) == (["The **Brenner**."], "The **Brenner**.")
        await chat.press("up", "y")
        assert clipboard[-1] == chat.app.clipboard == "Which?"
        await chat.until_said("sent to the clipboard")


async def test_slash_copy_takes_the_last_answer(clipboard: list[str]) -> None:
    async with running(session=long_talk(2)) as chat:
        await chat.send("/copy")
        await chat.until(lambda: clipboard == ["assistant 1, line 0"], "it is copied")


@pytest.mark.parametrize("command", ["/copy", "/code"])
async def test_there_is_nothing_to_copy_yet(clipboard: list[str], command: str) -> None:
    async with running() as chat:
        await chat.send(command)
        await chat.until_said("no answer to copy yet")
        assert clipboard == []


async def test_c_copies_one_code_block_after_the_other(clipboard: list[str]) -> None:
    async with running(session=held_before(("user", "How?"), ("assistant", CODE))) as chat:
        await chat.press("tab", "c")
        await chat.until_said("Code block 1 of 2")
        await chat.press("c", "c")
        assert clipboard == ["print(1)\n", "ls\n", "print(1)\n"]
        await chat.press("escape")
        await chat.send("/code")
        await chat.until(lambda: clipboard[-1] == "ls\n", "it goes on with the next block")


async def test_a_message_without_code_says_so(clipboard: list[str]) -> None:
    async with running(session=long_talk(1)) as chat:
        await chat.send("/code")
        await chat.until_said("no code block")
        assert clipboard == []


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
async def test_no_escape_reaches_the_clipboard(clipboard: list[str], text: str) -> None:
    async with running(session=held_before(("user", text), ("assistant", text))) as chat:
        await chat.press("tab", "y", "c", "up", "y", "c")
        await chat.pilot.pause()
        assert not set("".join(clipboard)) & set("\x1b\x07\x9b\x90\u202e")
        assert_harmless(chat)


async def test_text_is_selected_by_mouse_and_copied(clipboard: list[str]) -> None:
    async with running(session=held_before(("user", "Which?"), ("assistant", "The **Brenner** is."))) as chat:
        text = chat.transcript.query_one(AnswerMessage).query_one("MarkdownText")
        await chat.pilot.mouse_down(text, offset=(4, 0))
        await chat.pilot.hover(text, offset=(10, 0))
        await chat.pilot.mouse_up(text, offset=(10, 0))
        await chat.press("ctrl+c")
        assert clipboard == ["Brenner"]


def test_a_machine_without_a_clipboard_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_text: str) -> None:
        raise pyperclip.PyperclipException("no clipboard here")

    monkeypatch.setattr(pyperclip, "copy", refuse)
    assert not system.copied("text")


# --- thinking --------------------------------------------------------------------------------------------

THOUGHT = "<think>\nThe pass in May?\n</think>\n\nThe Brenner."


def thinking(chat: Chat) -> list[str]:
    """What stands over every answer that was thought about."""
    return [str(t.content) for t in chat.transcript.query(".thinking").results(Static) if t.display]


async def test_thinking_is_folded_shown_by_ctrl_t_and_saved_apart_from_the_answer() -> None:
    engine = ScriptedEngine().answers(*THOUGHT)
    async with running(engine) as chat:
        await chat.ask("Which?")
        assert chat.answers() == ["The Brenner."]
        assert thinking(chat) == ["▸ thinking · 4 words · Ctrl+T shows it"]
        await chat.press("ctrl+t")
        assert thinking(chat) == ["▾ thinking · 4 words\nThe pass in May?"]
        saved = chat.session.current.messages[-1]
        assert (saved.thinking, saved.text) == ("<think>\nThe pass in May?\n</think>\n\n", "The Brenner.")
        await chat.ask("And?")
        read = engine.requests[1].messages[1]
        assert (read.text, len(read.token_ids)) == (THOUGHT, len(THOUGHT))
        await chat.screen.controller.opened()
        await chat.until(lambda: len(thinking(chat)) == 1, "it is shown again")
        assert "The pass in May?" in thinking(chat)[0]
        await chat.press("ctrl+t")
        assert thinking(chat) == ["▸ thinking · 4 words · Ctrl+T shows it"]


async def test_thinking_shows_while_it_streams_and_when_it_never_ends() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("<thi", "nk>", "First ", "second", gate, " third")
    async with running(engine) as chat:
        await chat.send("Which?")
        await chat.until_reached(gate)
        await chat.until(lambda: thinking(chat) == ["▸ thinking … · 2 words · Ctrl+T shows it"], "it thinks")
        assert chat.answers() == [""]
        gate.open()
        await chat.until_idle()
        assert thinking(chat) == ["▸ thinking · 3 words · Ctrl+T shows it"]
        assert chat.kept()[-1][1] == "<think>First second third"


async def test_a_stopped_thought_is_gone_on_with() -> None:
    engine = ScriptedEngine()
    engine.answers("<think>", "One ", engine.gate())
    async with running(engine) as chat:
        await chat.send("Which?")
        await chat.until(lambda: thinking(chat), "it thinks")
        await chat.press("escape")
        await chat.until_idle()
        engine.answers("two</think>", "Done.")
        await chat.send("/continue")
        await chat.until(lambda: chat.answers() == ["Done."], "it is written")
        await chat.until_idle()
        assert engine.requests[1].messages[-1].text == "<think>One "
        assert chat.kept()[-1][1] == "<think>One two</think>Done."
