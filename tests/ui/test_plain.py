"""`kvchat chat --plain`: line by line, with the same session, engine and slash words."""

import io
import re
from pathlib import Path

import pytest

from kvchat.chat.commands import COMMANDS
from kvchat.chat.conversation import Preset
from kvchat.chat.session import Session
from kvchat.contract import (
    CacheEvent,
    CacheEventKind,
    CacheMode,
    Drop,
    Evicted,
    FinishReason,
    KVPrecision,
    Miss,
    Sampling,
    SetBudget,
    SetPrecision,
)
from kvchat.models.cards import DEFAULT_MODEL
from kvchat.ui.plain.commands import MOST_TOLD
from kvchat.ui.plain.loop import PlainChat, turn_sentence
from kvchat.ui.tour import STEPS
from tests.support.screen_driver import saved_conversation, session_over
from tests.support.scripted_engine import Fails, ScriptedEngine, stats_of
from tests.ui.test_models import OTHER, TITLE, Shop

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def talk(
    *lines: str,
    engine: ScriptedEngine | None = None,
    session: Session | None = None,
    shop: Shop | None = None,
) -> tuple[str, Session, ScriptedEngine]:
    """Types lines, then the input ends; returns what was written."""
    engine, session, out = engine or ScriptedEngine(), session or session_over(), io.StringIO()
    typed = io.StringIO("".join(f"{line}\n" for line in lines))
    chat = PlainChat(session, engine.attach, "Scripted", typed, out, shop.shelf() if shop else None)
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


def test_every_command_does_something_or_says_that_it_belongs_to_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    for command in COMMANDS:
        said, _, _ = talk("First", f"/{command.slash}", "no")
        assert len(said.splitlines()) > 3, command.name
    said, _, _ = talk("/panel", "/nothing")
    assert "/panel belongs to the screen. Without one, the figures of a turn stand after its answer." in said
    assert "There is no command /nothing. /help lists them." in said


def test_what_belongs_to_the_screen_is_told_with_what_to_do_instead() -> None:
    of_the_screen = [command for command in COMMANDS if command.instead]
    assert 0 < len(of_the_screen) < len(COMMANDS)
    said, _, _ = talk("/help", *(f"/{command.slash}" for command in of_the_screen))
    assert said.count("Needs the screen; without one, ") == len(of_the_screen)
    for command in of_the_screen:
        assert f"/{command.slash} belongs to the screen. Without one, {command.instead}." in said


def test_the_tour_does_every_step_line_by_line_and_leaves_nothing_behind() -> None:
    said, session, engine = talk("Bread?", "/tour", "And rolls?")
    places = [
        said.index(f"\n{n} of {len(STEPS)}: {step.title}. {step.before}") for n, step in enumerate(STEPS, 1)
    ]
    assert places == sorted(places)
    tour = engine.requests[1].conversation
    asked = [request for request in engine.requests if request.conversation == tour]
    assert len(asked) == len(STEPS)
    assert [request.mode for request in asked].count(CacheMode.OFF) == 1
    assert Drop(tour) in engine.acts
    assert SetPrecision(tour, KVPrecision.INT8) in engine.acts
    assert "were reused (▒)" in said
    assert "63 of the last 64 tokens" in said
    assert engine.starts == 2
    assert "That was the tour.\n" in said
    assert tour in engine.forgotten
    assert [m.text for m in session.current.messages if m.role == "user"] == ["Bread?", "And rolls?"]
    assert [summary.title for summary in session.conversations()] == ["Bread?"]


def test_a_tour_of_which_a_question_is_not_answered_ends_and_the_chat_goes_on() -> None:
    engine = ScriptedEngine().answers("Bread.").answers(Fails("There is no room."))
    said, session, _ = talk("Bread?", "/tour", "And rolls?", engine=engine)
    assert "There is no room.\nThe tour ends here: the question was not answered.\n" in said
    assert [m.text for m in session.current.messages if m.role == "user"] == ["Bread?", "And rolls?"]


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


def test_a_fork_may_end_at_an_earlier_question() -> None:
    said, session, _ = talk("First", "Second", "/fork 1", "/fork 9")
    assert [m.text for m in session.current.messages] == ["First", "ok"]
    assert "Which question?" in said


def test_what_was_to_be_edited_is_left_with_its_conversation() -> None:
    _, session, engine = talk("First", "/edit", "/new", "Second")
    assert [m.text for m in engine.requests[-1].messages] == ["Second"]
    assert len(session.conversations()) == 2


def test_words_are_found_on_every_branch_and_opened_where_they_stand() -> None:
    engine = ScriptedEngine().answers("The needle.").answers("Hay.").answers("Straw.")
    said, session, _ = talk(
        "Which?", "And then?", "/edit 1", "Where?", "/search needle", "/search zzz", "/search", engine=engine
    )
    name, hit = session.current.id, next(h for h in session.search(["needle"]) if h.message)
    assert f"{name}/{hit.message}: “Which?”, on another branch, the answer: The needle.\n" in said
    assert "1 hit. /sessions and what a hit begins with opens it.\n" in said
    assert "Nothing has them.\n" in said
    assert "/search WORDS finds them" in said
    said, session, _ = talk(
        f"/sessions {name}/{hit.message}", "/sessions x/y", "/search where", session=session
    )
    assert "“Which?”, 4 messages, goes on.\n" in said
    assert "This is another branch" in said
    assert "The answer: The needle.\n" in said
    assert "/search WORDS tells what can be opened." in said
    assert [m.text for m in session.current.messages] == ["Which?", "The needle.", "And then?", "Hay."]


def test_whoever_listens_is_told_a_part_of_many_hits_and_titles_are_opened_by_their_id() -> None:
    session = session_over()
    lines = [("user", f"needle {n}") for n in range(MOST_TOLD + 5)]
    name = saved_conversation(session._store, *lines, title="A needle").id
    said, _, _ = talk("/search needle", f"/sessions {name}", session=session)
    assert f"{name}: the title “A needle”\n" in said
    assert f"The first {MOST_TOLD} of {MOST_TOLD + 6} hits." in said
    assert said.count(f"{name}/") == MOST_TOLD - 1
    assert session.current.id == name


def test_conversations_go_into_files_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said, session, _ = talk(
        "/export", "First", "/export talk.json", "/import talk.json", "/import", "/import x"
    )
    assert "This conversation has no messages yet." in said
    assert f"Exported to {tmp_path / 'talk.json'}\n" in said
    assert "1 conversation imported.\n" in said
    assert "/import FILE reads" in said
    assert "x can't be read" in said
    assert len(session.conversations()) == 2


def test_nothing_of_a_private_conversation_is_kept() -> None:
    said, session, engine = talk("/private", "Secret", "/sessions")
    assert "Nothing of it is written" in said
    assert f"{session.current.id}: Secret, 2 messages, private\n" in said
    assert not engine.requests[0].persist
    assert session._store.summaries() == []


def test_answers_and_their_code_go_to_the_clipboard(
    clipboard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "So:\n\n```py\none\n```\n\n```py\ntwo\n```\n"
    engine = ScriptedEngine().answers(text).answers("Plain.")
    said, _, _ = talk(
        "/copy", "First", "/copy", "/code", "/code 2", "/code 3", "Second", "/code", engine=engine
    )
    assert clipboard == [text, "one\n", "two\n"]
    for words in ("There is no answer", "The last answer is in the clipboard.", "Code block 2 of 2 is in"):
        assert words in said
    assert "has 2 code blocks" in said
    assert "There is no code block" in said
    monkeypatch.setattr("kvchat.ui.plain.commands.copied", lambda _text: False)
    said, _, _ = talk("First", "/copy")
    assert "There is no clipboard here. /export FILE" in said


def test_options_are_told_changed_one_by_one_and_taken_from_presets() -> None:
    session = session_over()
    session.save_preset(Preset("Poet", "Rhyme.", Sampling(temperature=1.2, seed=7)))
    said, session, _ = talk(
        "/options", "/options top-k 5", "/options top_p 7", "/options rubbish", session=session
    )
    assert "temperature: 0.0\n" in said
    assert "seed: none\n" in said
    assert "presets: Poet." in said
    assert "top-p is a number" in said
    assert "rubbish is neither a preset nor an option with a value." in said
    assert session.current.sampling == Sampling(top_k=5)
    _, session, _ = talk("/options Poet", "/options seed none", session=session)
    assert session.current.system_prompt == "Rhyme."
    assert session.current.sampling == Sampling(temperature=1.2)


def test_what_going_on_costs_is_told_before_the_next_line_and_for_what_is_open() -> None:
    session = session_over()
    first = saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho")).id
    session.open(saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho"), title="Old").id)
    engine = ScriptedEngine().prices(2.4, Miss("nothing was kept", 1100, 2.26))
    engine.tells_openings = True
    said, _, _ = talk(f"/sessions {first}", "Next", engine=engine, session=session)
    told = [
        line.partition(": the next")[0] for line in said.splitlines() if "goes on" in line or "Going" in line
    ]
    assert told == [
        "“Old”, 2 messages, goes on.",
        "Going on here",
        "you: “Hi”, 2 messages, goes on.",
        "Going on here",
    ]


def test_what_happened_to_the_cache_is_told() -> None:
    session = session_over()
    said, _, _ = talk("/cache timeline", "First", session=session)
    assert "Nothing has happened" in said
    session.note_events([CacheEvent(session.current.id, CacheEventKind.MISS, 12, note="edited")])
    said, _, _ = talk("/cache timeline", session=session)
    assert "Miss 12 tokens: edited.\n" in said


def test_another_model_answers_once_its_engine_is_ready(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "models")
    shop.put(DEFAULT_MODEL)
    said, _, engine = talk(
        "/model", "First", f"/model {DEFAULT_MODEL}", "Second", f"/model {OTHER}", shop=shop
    )
    assert f"{DEFAULT_MODEL}, is here\n" in said
    assert f"{OTHER}\n" in said
    assert f"{TITLE} answers from now on.\n" in said
    assert f"{TITLE}: ok\n" in said
    assert f"{OTHER} is not here yet" in said
    assert [len(each.requests) for each in (engine, *shop.engines)] == [1, 1]
    said, _, _ = talk("/model x")
    assert "No other model can be had here." in said


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


def test_files_are_attached_by_the_rules_of_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes.md").write_text("The pass is open.\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "long.txt").write_text("word " * 9000)
    engine = ScriptedEngine()
    engine.tells_typed = True
    lines = (
        'Read @"my notes.md"!',
        "Ask @alice",
        "See @picture.png",
        "See @long.txt",
        "/undo",
        "/edit",
        "/undo",
    )
    said, session, _ = talk(*lines, engine=engine)
    message = 'Read @"my notes.md"!\n\n<file name="my notes.md">\nThe pass is open.\n</file>'
    assert [request.messages[-1].text for request in engine.requests] == [message, "Ask @alice"]
    assert "Attached my notes.md, 4 tokens.\nScripted: ok\n" in said
    assert "picture.png is not UTF-8 text; only text files can be attached.\n" in said
    assert "long.txt has 9,000 tokens; the context holds 8,192. Attach a part of it.\n" in said
    assert 'It was: Read @"my notes.md"!. The next line' in said
    assert 'Taken back: Read @"my notes.md"!\n' in said
    assert session.current.messages == ()


def test_a_file_waits_for_no_engine_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("Open.")
    engine = ScriptedEngine()  # it counts nothing
    monkeypatch.setattr("kvchat.ui.plain.loop.COUNT_S", 0.05)
    said, _, _ = talk("Read @notes.md", engine=engine)
    assert "Attached notes.md.\n" in said
    assert engine.requests[0].messages[0].text.endswith("\nOpen.\n</file>")


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


def test_a_message_that_was_not_sent_is_in_no_later_prompt_and_can_be_sent_again() -> None:
    engine = ScriptedEngine().answers("One.").answers(Fails("Too long.")).answers("Two.").answers("Three.")
    said, session, _ = talk("First", "A long one", "Second", engine=engine)
    assert "Too long.\nNot sent: A long one\n/regen sends it again" in said
    assert [m.text for m in engine.requests[2].messages] == ["First", "One.", "Second"]
    assert [m.text for m in session.current.messages if m.not_sent] == ["A long one"]
    engine = ScriptedEngine().answers(Fails("Too long.")).answers("Two.")
    talk("A long one", "/regen", engine=engine)
    assert [m.text for m in engine.requests[1].messages] == ["A long one"]


def test_an_edit_that_was_not_sent_is_asked_in_the_same_place_with_the_next_line() -> None:
    engine = ScriptedEngine().answers("One.").answers(Fails("Too long.")).answers("Two.")
    said, session, _ = talk("First", "/edit 1", "A long one", "A short one", engine=engine)
    assert "The old question stays." in said
    assert [m.text for m in engine.requests[2].messages] == ["A short one"]
    assert [m.text for m in session.current.messages] == ["A short one", "Two."]
