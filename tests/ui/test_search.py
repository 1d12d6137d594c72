"""Search in all conversations, from Ctrl+F to the words marked where they stand."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.segment import Segment
from textual.widgets import Input, OptionList

from kvchat.chat.conversation_commands import delete_now
from kvchat.chat.store import Store
from kvchat.text import excerpt
from kvchat.ui.screens.search import SearchScreen
from kvchat.ui.widgets.message import MessageBlock
from tests.support.samples import finished
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import ScriptedEngine
from tests.ui.test_hostile import WORST, assert_harmless, segments

ALPS = (("user", "Which Pass is open in May?"), ("assistant", "The **Brenner** is, 100%."))
BREAD = (("user", "How long does bread rise?"), ("assistant", "An hour; 漢字かな交じり文 in a cold kitchen."))


def found(store: Store, words: str) -> list[str]:
    """The role, or `title`, of every hit; with a star, of one on a branch that is not shown."""
    hits = store.search(words.split(), 100)
    return [(h.role or "title") + "*" * h.other_branch + " not sent" * h.not_sent for h in hits]


def hits(chat: Chat) -> list[str]:
    return [str(option.prompt) for option in chat.app.screen.query_one(OptionList).options]


async def search(chat: Chat, words: str, count: int) -> None:
    """Opens the search, types words and waits for so many hits."""
    await chat.press("ctrl+f")
    await chat.dialog(SearchScreen)
    chat.app.screen.query_one(Input).value = words
    await chat.until(lambda: len(hits(chat)) == count, f"{count} hits for {words!r}")


@pytest.mark.parametrize(
    ("words", "roles"),
    [
        ("pass", ["title", "user"]),
        ("PASS may", ["title", "user"]),
        ("renne", ["assistant"]),
        ("brenner bread", []),
        ("字かな", ["assistant"]),
        ("漢字", ["assistant"]),
        ("100%", ["assistant"]),
        ("%", ["assistant"]),
        ("_", []),
        ("an", ["assistant"]),
        ('"', []),
        ("NOT", []),
        ("*", ["assistant"]),
        ("", []),
    ],
)
def test_words_and_parts_of_words_are_found_as_they_are_written(words: str, roles: list[str]) -> None:
    store = Store(None)
    saved_conversation(store, *ALPS)
    saved_conversation(store, *BREAD)
    assert found(store, words) == roles


def test_what_is_searched_follows_edits_deletions_forks_and_branches(tmp_path: Path) -> None:
    store = Store(tmp_path / "kvchat.db")
    session = session_over(store)
    session.open(saved_conversation(store, *ALPS, title="x").id)
    assert found(store, "Brenner") == ["assistant"]
    session.fork()
    assert found(store, "Brenner") == ["assistant", "assistant"]
    turn = session.edit(session.current.messages[0].id, "Which lake?").turn
    assert found(store, "Brenner") == ["assistant", "assistant"]
    assert found(store, "lake") == ["user* not sent"]
    session.finish_turn(finished(turn, "Garda.", 1))
    assert found(store, "Brenner") == ["assistant*", "assistant"]
    assert found(store, "lake") == ["user"]
    session.clear()
    assert found(store, "Brenner") == ["assistant*", "assistant"]
    assert found(store, "lake") == ["user*"]
    for summary in store.summaries():
        store.delete(summary.id)
    assert found(store, "Brenner") == found(store, "lake") == []
    assert store._db.execute("select count(*) from messages_fts_docsize").fetchone() == (0,)


async def test_an_answer_can_be_found_as_soon_as_it_is_written() -> None:
    engine = ScriptedEngine().answers("The Bren", "ner is open.")
    async with running(engine) as chat:
        await chat.ask("Which?")
        assert found(chat.store, "brenner") == ["assistant"]


async def test_ctrl_f_enter_opens_the_conversation_where_the_words_stand() -> None:
    session = session_over()
    lines = "\n\n".join("line" for _ in range(12))
    talk = [(role, f"{role} {n}\n\n{lines}") for n in range(60) for role in ("user", "assistant")]
    talk[21] = ("assistant", "Here is the needle, in a haystack.")
    saved_conversation(session._store, *talk, title="Long")
    async with running(session=session) as chat:
        await search(chat, "needle", 1)
        assert hits(chat)[0].startswith("Long · answer · ")
        assert hits(chat)[0].endswith("\nHere is the needle, in a haystack.")
        await chat.press("enter")
        await chat.until(lambda: isinstance(chat.app.focused, MessageBlock), "a message has the focus")
        assert chat.title() == "Long"
        await chat.until_visible("Here is the needle")
        block = chat.app.focused
        assert isinstance(block, MessageBlock)
        assert block.place == 21
        needles = [s for s in segments(chat) if "needle" in s.text and "needle" not in chat.prompt.text]
        plain = [s for s in segments(chat) if "haystack" in s.text]
        assert [s.text for s in needles] == ["needle"]
        assert {str(s.style).split(" on ")[-1] for s in needles} != {
            str(s.style).split(" on ")[-1] for s in plain
        }


async def test_a_hit_on_another_branch_says_so_and_opens_that_branch() -> None:
    session = session_over()
    engine = ScriptedEngine().answers("The needle.").answers("Hay.").answers("Straw.")
    async with running(engine, session) as chat:
        await chat.ask("Which?")
        await chat.ask("And then?")
        turn = chat.session.edit(chat.session.current.messages[0].id, "Where?").turn
        chat.session.finish_turn(finished(turn, "There.", 1))
        await chat.screen.controller.opened()
        assert chat.questions() == ["Where?"]
        await search(chat, "needle", 1)
        assert hits(chat)[0].startswith("Which? · answer · other branch · ")
        await chat.press("enter")
        await chat.until(
            lambda: chat.questions() == ["Which?", "And then?"], "its branch is shown to its end"
        )
        await chat.until_said("another branch")
        block = chat.app.focused
        assert isinstance(block, MessageBlock)
        assert block.place == 1
        assert [m.text for m in chat.store.load(session.current.id).messages][-1] == "Hay."
        await search(chat, "needle", 1)
        assert "other branch" not in hits(chat)[0]
        await chat.press("escape")
        await chat.until(lambda: len(chat.app.screen_stack) == 1, "the search is closed")
        await chat.ask("Later?")
        assert [m.text for m in engine.requests[-1].messages[::2]] == ["Which?", "And then?", "Later?"]


async def test_another_branch_of_a_conversation_that_is_answered_is_not_opened() -> None:
    engine = ScriptedEngine().answers("The needle.")
    writing = engine.gate()
    engine.answers("Hay, ", writing, "and straw.")
    async with running(engine) as chat:
        await chat.ask("Which?")
        await chat.send("/regen")
        await chat.until(lambda: writing.reached, "it is under way")
        await search(chat, "needle", 1)
        await chat.press("enter")
        await chat.until_said("on another branch than the answer that is being written")
        writing.open()
        await chat.until_idle()
        assert chat.answers() == ["Hay, and straw."]


def background(parts: Iterable[Segment]) -> set[object]:
    """The colours that text stands on."""
    return {part.style.bgcolor for part in parts if part.style}


async def test_words_in_a_question_are_marked_even_where_it_is_folded() -> None:
    session = session_over()
    text = "\n".join(f"line {n}" for n in range(500)) + "\nneedle"
    saved_conversation(session._store, ("user", text), ("assistant", "Long."), title="Long")
    async with running(session=session) as chat:
        await search(chat, "needle", 1)
        await chat.press("enter")
        await chat.until(lambda: chat.questions() == [text], "it is unfolded")


async def test_down_chooses_another_hit_and_a_title_opens_its_conversation() -> None:
    session = session_over()
    saved_conversation(session._store, *ALPS)
    saved_conversation(session._store, *BREAD, title="Bread")
    async with running(session=session) as chat:
        await search(chat, "bread", 2)
        await chat.press("down", "up", "enter")
        await chat.until(lambda: chat.title() == "Bread", "it is open")
        await search(chat, "pass", 2)
        await chat.press("escape")
        await chat.until(lambda: len(chat.app.screen_stack) == 1, "the search is closed")


async def test_slash_search_takes_its_words_and_says_when_nothing_has_them() -> None:
    session = session_over()
    saved_conversation(session._store, *ALPS)
    async with running(session=session) as chat:
        await chat.send("/search brenner")
        await chat.dialog(SearchScreen)
        await chat.until(lambda: len(hits(chat)) == 1, "it is found")
        await chat.press(*"zzz")
        await chat.until_visible("Nothing has all of these words.")
        await chat.press("enter", "escape")
        await chat.until(lambda: len(chat.app.screen_stack) == 1, "the search is closed")


async def test_hostile_hits_are_harmless() -> None:
    session = session_over()
    saved_conversation(session._store, ("user", WORST), ("assistant", WORST), title=WORST)
    async with running(session=session) as chat:
        await search(chat, "[/b]", 3)
        assert_harmless(chat)
        await chat.press("down", "enter")
        await chat.until(lambda: isinstance(chat.app.focused, MessageBlock), "it is open")
        assert_harmless(chat)


def test_an_excerpt_begins_shortly_before_the_word() -> None:
    assert excerpt("a " * 50 + "needle\nafter", ["NEEDLE"]) == "…" + "a " * 15 + "needle after"
    assert excerpt("needle", ["needle"]) == "needle"


# --- private ---------------------------------------------------------------------------------------------


def contents(folder: Path) -> bytes:
    """What all files of a folder say."""
    return b"".join(file.read_bytes() for file in folder.iterdir())


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


async def test_nothing_of_a_private_conversation_is_written(tmp_path: Path) -> None:
    path = tmp_path / "kvchat.db"
    engine = ScriptedEngine().answers("An open answer.")
    async with running(engine, session_over(Store(path))) as chat:
        await chat.ask("An open question")
        engine.answers("The secret answer.")
        await chat.send("/private")
        await chat.until(lambda: "private" in chat.title(), "it is private")
        await chat.ask("A secret question")
        assert chat.answers() == ["The secret answer."]
        await chat.write("a secret draft")
        await chat.screen.run_action("run_command('rename', 'Secret title')")
        assert [request.persist for request in engine.requests] == [True, False]
        assert [line.split()[1] for line in chat.listed()] == ["✱", "An"]
        assert [hit.title for hit in chat.session.search(["secret"])]
        await chat.screen.run_action("run_command('fork')")
        await chat.until(lambda: "(fork)" in chat.title(), "it is forked")
        assert "private" in chat.title()
        await chat.ask("A secret second question")
        assert not engine.requests[-1].persist
    assert b"open answer" in contents(tmp_path)
    assert b"ecret" not in contents(tmp_path)
    again = session_over(Store(path))
    assert [summary.title for summary in again.conversations()] == ["An open question"]


async def test_a_private_conversation_can_be_left_opened_again_and_deleted() -> None:
    async with running() as chat:
        await chat.send("/private")
        await chat.until(lambda: "private" in chat.title(), "it is private")
        await chat.ask("Secret")
        secret = chat.session.current.id
        await chat.press("ctrl+n")
        await chat.ask("Open")
        assert chat.engine.requests[-1].persist
        chat.session.open(secret)
        await chat.screen.controller.opened()
        assert chat.questions() == ["Secret"]
        await delete_now(chat.screen.controller, secret)
        assert [s.title for s in chat.session.conversations()] == ["Open"]


# --- files -----------------------------------------------------------------------------------------------


async def test_export_and_import_from_the_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = session_over()
    session.open(saved_conversation(session._store, *ALPS, title="Alps").id)
    async with running(session=session) as chat:
        for command in ("/export talk.md", "/export json", "/export html", "/export"):
            await chat.send(command)
            await chat.until(lambda: chat.prompt.text == "", "it is taken")
        await chat.until(lambda: len(names(tmp_path)) == 4, "four files are written")
        assert names(tmp_path) == {"talk.md", "alps.json", "alps.html", "alps.md"}
        await chat.send("/import talk.md")
        await chat.until_said("1 conversation imported.")
        assert [line.split()[1] for line in chat.listed()].count("Alps") == 2
        await chat.send("/import talk.md")
        await chat.until_said("0 conversations imported. 1 of the file were here already.")
        await chat.send("/export talk.md")
        await chat.until_said("exists already")
        await chat.send("/import nothing.md")
        await chat.until_said("can't be read")


async def test_an_export_of_the_shown_branch_says_what_it_lacks_and_json_lacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = session_over()
    session.open(saved_conversation(session._store, *ALPS).id)
    session.undo()
    session.begin_turn("Which lake?")
    session.abandon_turn()
    async with running(session=session) as chat:
        await chat.screen.run_action("run_command('export', 'a.json')")
        await chat.until_said("a.json")
        assert not any("branch" in said for said in chat.said())
        await chat.screen.run_action("run_command('export', 'a.md')")
        await chat.until_said("2 messages on other branches are not in this file")
    assert "Brenner" in (tmp_path / "a.json").read_text()
    assert "Brenner" not in (tmp_path / "a.md").read_text()


async def test_an_empty_conversation_is_not_exported() -> None:
    async with running() as chat:
        await chat.send("/export md")
        await chat.until_said("no messages yet")
