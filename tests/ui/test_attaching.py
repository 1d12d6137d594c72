"""Files and long pastes in the prompt, and what is said under it before anything is sent."""

from pathlib import Path

import pytest

from kvchat.contract import CountTokens, Miss
from kvchat.ui.widgets.prompt import LONG_PASTE
from kvchat.ui.widgets.prompt_cost import GAP, HINTS, ReckoningLine, hints_in
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import ScriptedEngine
from tests.ui.test_hostile import WORST, assert_harmless

NOTES = "The Brenner is open.\nThe Stelvio is not.\n"
SENT = f'Read @notes.md\n\n<file name="notes.md">\n{NOTES.rstrip()}\n</file>'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that kvchat is started in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text(NOTES)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "my notes.txt").write_text("x")
    return tmp_path


def counting() -> ScriptedEngine:
    """An engine that tells what text in the prompt would cost: a word is a token."""
    engine = ScriptedEngine().prices(0.1)
    engine.tells_typed = True
    return engine


def under_the_prompt(chat: Chat) -> list[str]:
    return str(chat.screen.query_one(ReckoningLine).render()).splitlines()


def hints(chat: Chat) -> list[str]:
    """What stands there while there is nothing to reckon."""
    return [hints_in(chat.screen.query_one(ReckoningLine).size.width)]


async def until_under(chat: Chat, *lines: str) -> None:
    await chat.until(lambda: under_the_prompt(chat) == list(lines), f"{lines} stand under the prompt")


# --- counting --------------------------------------------------------------------------------------------


async def test_tokens_and_what_would_be_read_stand_under_the_prompt() -> None:
    engine = counting()
    async with running(engine) as chat:
        assert under_the_prompt(chat) == hints(chat) == ["Enter sends · Ctrl+J breaks the line"]
        await chat.write("Which pass is open?")
        await until_under(chat, "4 tokens · will read 1,204 new")
        await chat.press("enter")
        await chat.until_idle()
        await until_under(chat, *hints(chat))
        await chat.write("one")
        await until_under(chat, "1 token · will read 1,204 new")
        assert engine.acts == []


async def test_typing_moves_nothing() -> None:
    async with running(counting()) as chat:
        before = chat.prompt.region, chat.transcript.region
        await chat.press("a")
        assert (chat.prompt.region, chat.transcript.region) == before
        await until_under(chat, "1 token · will read 1,204 new")
        assert (chat.prompt.region, chat.transcript.region) == before


@pytest.mark.parametrize("width", range(0, 110, 7))
def test_hints_are_never_cut(width: int) -> None:
    assert len(hints_in(width)) <= width
    assert hints_in(width) in {GAP.join(HINTS[:count]) for count in range(len(HINTS) + 1)}
    assert hints_in(200) == GAP.join(HINTS)


async def test_another_width_has_room_for_other_hints() -> None:
    async with running(size=(200, 40)) as chat:
        await chat.until_visible("Up brings back what you sent")
        await chat.pilot.resize_terminal(60, 20)
        await chat.until(lambda: "Up brings" not in chat.visible(), "the last hint is gone")
        assert "Tab goes to the messages" not in chat.visible()
        assert "Ctrl+J breaks the line" in chat.visible()
        assert chat.screen.query_one(ReckoningLine).size.height == 1


async def test_every_pause_asks_once_and_known_texts_are_not_counted_again() -> None:
    engine = counting()
    async with running(engine) as chat:
        await chat.press(*"abc")
        await until_under(chat, "1 token · will read 1,204 new")
        counted = [act.texts for act in engine.typed if isinstance(act, CountTokens)]
        await chat.press("d", "backspace")
        asked = len(engine.typed)
        await chat.until(lambda: len(engine.typed) > asked, "it is asked again")
        assert [act.texts for act in engine.typed if isinstance(act, CountTokens)] == counted


async def test_what_does_not_fit_is_said_before_it_is_sent() -> None:
    engine = counting().prices(1.0, Miss("edited", 1, None), refusal="The context holds 8,192 tokens.")
    async with running(engine) as chat:
        await chat.write("long")
        await until_under(chat, "The context holds 8,192 tokens.")


async def test_editing_is_priced_as_the_message_in_its_place() -> None:
    session = session_over()
    talk = (("user", "One"), ("assistant", "Eins"), ("user", "Two"), ("assistant", "Zwei"))
    session.open(saved_conversation(session._store, *talk).id)
    engine = counting()
    async with running(engine, session) as chat:
        await chat.send("/edit 1")
        await until_under(chat, "1 token · will read 1,204 new")
        request = engine.typed[-1]
        assert not isinstance(request, CountTokens)
        assert [m.text for m in request.request.messages] == ["One"]


async def test_commands_and_an_engine_that_is_not_ready_say_nothing() -> None:
    engine = counting()
    async with running(engine) as chat:
        await chat.write("/policy")
        await chat.pilot.pause(0.5)
        assert under_the_prompt(chat) == hints(chat)
        engine.die("gone")
        await chat.until(lambda: engine.starts == 2, "it starts again")
        assert engine.typed == []


# --- files -----------------------------------------------------------------------------------------------


async def test_a_mentioned_file_is_a_chip_and_goes_with_the_message() -> None:
    engine = counting()
    async with running(engine) as chat:
        await chat.write("Read @notes.md")
        await until_under(chat, "▤ notes.md · 8 tokens", "13 tokens · will read 1,204 new")
        await chat.press("enter")
        await chat.until_idle()
        assert engine.requests[0].messages[0].text == SENT
        assert chat.kept()[0][1] == SENT
        assert chat.questions() == ["Read @notes.md"]
        await chat.until_visible("▤ notes.md · 2 lines")
        await chat.press("tab", "up", "enter")
        await chat.until(lambda: chat.questions() == [SENT], "it is unfolded")


async def test_a_path_is_completed_into_folders_and_names_with_spaces() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.write("Read @s")
        await chat.until_visible("src/")
        await chat.press("tab")
        assert chat.prompt.text == "Read @src/"
        await chat.until_visible("my notes.txt")
        await chat.press("enter")
        assert chat.prompt.text == 'Read @"src/my notes.txt" '
        await chat.press("enter")
        await chat.until(lambda: engine.requests, "it is sent")
        assert '<file name="src/my notes.txt">\nx\n</file>' in engine.requests[0].messages[0].text


async def test_a_binary_file_is_refused_and_the_message_comes_back() -> None:
    engine = counting()
    async with running(engine) as chat:
        await chat.write("See @picture.png")
        await chat.until(lambda: "only text files" in under_the_prompt(chat)[0], "it is said at once")
        await chat.press("enter")
        await chat.until_said("only text files can be attached")
        assert chat.prompt.text == "See @picture.png"
        assert engine.requests == []


async def test_a_file_larger_than_the_context_is_refused(folder: Path) -> None:
    (folder / "book.txt").write_text("word " * 9000)
    engine = counting()
    async with running(engine) as chat:
        await chat.write("Read @book.txt")
        await chat.until(lambda: "9,000 tokens" in under_the_prompt(chat)[0], "it is counted")
        await chat.press("enter")
        await chat.until_said("book.txt has 9,000 tokens; the context holds 8,192. Attach a part of it.")
        assert chat.prompt.text == "Read @book.txt"
        assert engine.requests == []


async def test_what_is_no_file_stays_a_word() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Ask @somebody about @dataclass")
        assert engine.requests[0].messages[0].text == "Ask @somebody about @dataclass"


async def test_a_recalled_or_edited_message_has_the_file_as_it_was(folder: Path) -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Read @notes.md")
        (folder / "notes.md").write_text("changed")
        await chat.press("up")
        assert chat.prompt.text == "Read @notes.md"
        await chat.press("enter")
        await chat.until_idle()
        assert [m.text for m in engine.requests[1].messages if m.role == "user"] == [SENT, SENT]
        await chat.send("/edit 1")
        await chat.until(lambda: chat.prompt.text == "Read @notes.md", "it is in the prompt")
        await chat.press("enter")
        await chat.until(lambda: len(engine.requests) == 3, "it is asked again")
        assert engine.requests[2].messages[0].text == SENT


async def test_hostile_files_are_harmless(folder: Path) -> None:
    (folder / "[b]").write_text(WORST)
    async with running(counting()) as chat:
        await chat.ask("Read @[b]")
        await chat.press("tab", "up", "enter")
        await chat.pilot.pause()
        assert_harmless(chat)


# --- long pastes -----------------------------------------------------------------------------------------


async def test_a_long_paste_is_a_mention_of_itself_and_is_sent_whole() -> None:
    text = "\n".join(f"line {n}" for n in range(LONG_PASTE))
    engine = counting()
    async with running(engine) as chat:
        await chat.press(*"Sum")
        await chat.write(text)
        assert chat.prompt.text == "Sum @pasted-1 "
        await chat.until(lambda: "pasted-1 · 16,000 tokens" in under_the_prompt(chat)[0], "it is counted")


async def test_two_long_pastes_survive_a_restart_as_a_draft() -> None:
    engine = ScriptedEngine()
    session = session_over()
    first, second = "a " * LONG_PASTE, "b " * LONG_PASTE
    async with running(engine, session) as chat:
        await chat.write(first)
        await chat.write(second)
        assert chat.prompt.text == "@pasted-1 @pasted-2 "
    async with running(engine, session_over(session._store)) as chat:
        assert chat.prompt.text.split() == ["@pasted-1", "@pasted-2"]
        await chat.press("backspace", *["backspace"] * 10, "enter")
        await chat.until(lambda: engine.requests, "it is sent")
        assert first in engine.requests[0].messages[0].text
        assert "b b" not in engine.requests[0].messages[0].text
