"""The conductor: everything is saved before anything happens with it, however a turn ends."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvchat import session as session_module
from kvchat.contract import CacheMode, PromptMessage, Sampling
from kvchat.conversation import Conversation, Message
from kvchat.errors import KvchatError
from kvchat.session import PARTIAL_EVERY_S, Defaults, Session
from kvchat.store import Store
from tests.samples import FIGURES, TOKENIZER, finished, piece

DEFAULTS = Defaults("maker/model", "Be brief.", CacheMode.TURN, Sampling(temperature=0.3, seed=5))
FIRST, SECOND = "Which pass is open?", "How long is the drive?"


@dataclass
class Clock:
    """Stands in for the `time` module; the test moves it."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kvchat.db"


@pytest.fixture
def session(path: Path) -> Iterator[Session]:
    with closing(Store(path)) as store:
        yield Session(store, DEFAULTS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    return clock


def on_disk(path: Path, conversation: str) -> Conversation:
    """The conversation as the next start of the program finds it."""
    with closing(Store(path)) as store:
        return store.load(conversation)


def talk(messages: tuple[Message, ...]) -> list[tuple[str, str, str | None]]:
    """Who said what, and how it ended."""
    return [(m.role, m.text, m.finish_reason) for m in messages]


def answered(session: Session, question: str, text: str = "The Brenner.") -> Message:
    """A whole turn; returns its answer."""
    request = session.begin_turn(question)
    session.keep_partial(piece(request.turn, text, 1, 2))
    message = session.finish_turn(finished(request.turn, text, 1, 2))
    assert message
    return message


def all_messages(path: Path) -> int:
    """Of every branch."""
    with closing(Store(path)) as store:
        return sum(summary.messages for summary in store.summaries())


# how a turn goes


def test_the_question_is_on_disk_before_the_request_leaves(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    saved = on_disk(path, request.conversation)
    assert talk(saved.messages) == [("user", FIRST, None)]
    assert (saved.model, saved.system_prompt, saved.mode, saved.sampling) == (
        DEFAULTS.model,
        DEFAULTS.system_prompt,
        DEFAULTS.mode,
        DEFAULTS.sampling,
    )
    assert request.messages == (PromptMessage("system", "Be brief."), PromptMessage("user", FIRST))
    assert (request.mode, request.sampling) == (CacheMode.TURN, DEFAULTS.sampling)


def test_the_answer_is_saved_with_ids_and_figures(session: Session, path: Path) -> None:
    message = answered(session, FIRST)
    saved = on_disk(path, session.current.id)
    assert saved.messages[-1] == message == session.current.head
    assert (message.text, message.token_ids, message.tokenizer) == ("The Brenner.", (1, 2), TOKENIZER)
    assert (message.finish_reason, message.stats) == ("stop", FIGURES)
    assert message.parent_id == saved.messages[0].id
    assert session.pending is None


def test_the_next_request_carries_the_ids_of_the_answer(session: Session) -> None:
    first = session.begin_turn(FIRST)
    session.finish_turn(finished(first.turn, "The Brenner.", 1, 2))
    second = session.begin_turn(SECOND)
    assert second.messages[1:] == (
        PromptMessage("user", FIRST),
        PromptMessage("assistant", "The Brenner.", (1, 2), TOKENIZER),
        PromptMessage("user", SECOND),
    )
    assert (first.conversation, first.turn != second.turn) == (second.conversation, True)


def test_the_answer_reaches_the_disk_once_a_second(session: Session, path: Path, clock: Clock) -> None:
    request = session.begin_turn(FIRST)

    def saved() -> list[str]:
        return [m.text for m in on_disk(path, request.conversation).messages[1:]]

    session.keep_partial(piece(request.turn, "The ", 1))
    assert saved() == []
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(request.turn, "Bren", 2))
    assert saved() == ["The Bren"]
    clock.now += PARTIAL_EVERY_S / 2
    session.keep_partial(piece(request.turn, "ner ", 3))
    assert saved() == ["The Bren"]
    clock.now += PARTIAL_EVERY_S / 2
    session.keep_partial(piece(request.turn, "is.", 4))
    assert saved() == ["The Brenner is."]
    session.finish_turn(finished(request.turn, "The Brenner is.", 1, 2, 3, 4))
    assert saved() == ["The Brenner is."]
    assert all_messages(path) == 2


def test_after_a_crash_the_answer_so_far_is_there_and_marked_as_cut_off(
    session: Session, path: Path, clock: Clock
) -> None:
    request = session.begin_turn(FIRST)
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(request.turn, "The Bren", 1, 2))
    with closing(Store(path)) as store:
        later = Session(store, DEFAULTS)
        (_, partial) = later.open_latest().messages
        assert (partial.text, partial.finish_reason, partial.stats) == ("The Bren", None, None)
        assert (partial.token_ids, partial.tokenizer) == ((1, 2), TOKENIZER)
        following = later.begin_turn(SECOND)
        assert following.messages[2] == PromptMessage("assistant", "The Bren", (1, 2), TOKENIZER)


def test_the_open_conversation_shows_the_partial_answer_once(session: Session, clock: Clock) -> None:
    request = session.begin_turn(FIRST)
    for text in ("The ", "Brenner", "."):
        clock.now += PARTIAL_EVERY_S
        session.keep_partial(piece(request.turn, text, 1))
    assert talk(session.current.messages) == [("user", FIRST, None), ("assistant", "The Brenner.", None)]


@pytest.mark.parametrize("finish", ["cancelled", "length", "context"])
def test_a_turn_that_was_stopped_keeps_its_text(session: Session, path: Path, finish: str) -> None:
    request = session.begin_turn(FIRST)
    session.finish_turn(finished(request.turn, "The Bren", 1, 2, finish=finish))
    saved = on_disk(path, request.conversation)
    assert talk(saved.messages) == [("user", FIRST, None), ("assistant", "The Bren", finish)]
    answered(session, SECOND)
    assert session.current.messages[:2] == saved.messages
    assert session.current.messages[2].parent_id == saved.messages[1].id


def test_a_turn_that_failed_in_mid_answer_keeps_its_text(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    session.keep_partial(piece(request.turn, "The Bren", 1, 2))
    session.fail_turn(request.turn)
    saved = on_disk(path, request.conversation)
    assert saved == session.current
    assert talk(saved.messages) == [("user", FIRST, None), ("assistant", "The Bren", "error")]
    assert session.pending is None


def test_a_turn_that_failed_at_once_leaves_the_question(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    session.fail_turn(request.turn)
    assert talk(on_disk(path, request.conversation).messages) == [("user", FIRST, None)]
    again = session.begin_turn(SECOND)
    assert again.messages[1:] == (PromptMessage("user", f"{FIRST}\n\n{SECOND}"),)


def test_abandoning_keeps_what_was_written(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    session.keep_partial(piece(request.turn, "The Bren", 1, 2))
    session.abandon_turn()
    saved = on_disk(path, request.conversation)
    assert talk(saved.messages) == [("user", FIRST, None), ("assistant", "The Bren", "cancelled")]
    session.abandon_turn()
    assert all_messages(path) == 2


def test_abandoning_without_text_leaves_the_question(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    session.abandon_turn()
    assert talk(on_disk(path, request.conversation).messages) == [("user", FIRST, None)]
    assert session.finish_turn(finished(request.turn, "Too late.", 1)) is None
    assert all_messages(path) == 1


def test_events_of_another_turn_change_nothing(session: Session, path: Path, clock: Clock) -> None:
    session.begin_turn(FIRST)
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece("another", "Not this.", 1))
    session.fail_turn("another")
    assert session.finish_turn(finished("another", "Not this.", 1)) is None
    assert session.pending
    assert (session.pending.text, session.pending.ids) == ("", [])
    assert all_messages(path) == 1


def test_a_second_turn_is_refused_while_one_is_answered(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    with pytest.raises(KvchatError, match="still being written"):
        session.begin_turn(SECOND)
    with pytest.raises(KvchatError, match="still being written"):
        session.regenerate()
    session.new()
    with pytest.raises(KvchatError, match="still being written"):
        session.begin_turn("Elsewhere")
    assert all_messages(path) == 1
    session.finish_turn(finished(request.turn, "The Brenner.", 1))
    session.begin_turn("Elsewhere")


# other conversations meanwhile


def test_an_answer_finishes_in_a_conversation_that_is_not_open(
    session: Session, path: Path, clock: Clock
) -> None:
    request = session.begin_turn(FIRST)
    other = session.new()
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(request.turn, "The Bren", 1))
    message = session.finish_turn(finished(request.turn, "The Brenner.", 1, 2))
    assert session.current == other
    saved = on_disk(path, request.conversation)
    assert talk(saved.messages) == [("user", FIRST, None), ("assistant", "The Brenner.", "stop")]
    assert session.open(request.conversation).head == message


@pytest.mark.parametrize("saved_before", [True, False])
def test_coming_back_to_the_conversation_that_is_answered(
    session: Session, clock: Clock, saved_before: bool
) -> None:
    request = session.begin_turn(FIRST)
    clock.now += PARTIAL_EVERY_S if saved_before else 0
    session.keep_partial(piece(request.turn, "The ", 1))
    session.new()
    session.open(request.conversation)
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(request.turn, "Bren", 2))
    assert talk(session.current.messages) == [("user", FIRST, None), ("assistant", "The Bren", None)]
    session.finish_turn(finished(request.turn, "The Brenner.", 1, 2))
    assert talk(session.current.messages) == [("user", FIRST, None), ("assistant", "The Brenner.", "stop")]


@pytest.mark.parametrize("open_it", [True, False])
def test_deleting_a_conversation_that_is_answered(
    session: Session, path: Path, clock: Clock, open_it: bool
) -> None:
    answered(session, "Stays?")
    stays = session.current
    session.new()
    request = session.begin_turn(FIRST)
    if not open_it:
        session.open(stays.id)
    session.delete(request.conversation)
    assert session.pending is None
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(request.turn, "The Bren", 1))
    assert session.finish_turn(finished(request.turn, "The Brenner.", 1)) is None
    session.fail_turn(request.turn)
    assert [s.id for s in session.conversations()] == [stays.id]
    assert all_messages(path) == 2
    assert (session.current == stays) is not open_it
    assert request.conversation not in (session.current.id, stays.id)
    session.begin_turn(SECOND)


def test_clearing_a_conversation_that_is_answered(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    session.keep_partial(piece(request.turn, "The Bren", 1))
    session.clear()
    assert session.finish_turn(finished(request.turn, "The Brenner.", 1)) is None
    assert session.current.messages == on_disk(path, request.conversation).messages == ()
    assert session.begin_turn(SECOND).messages[1:] == (PromptMessage("user", SECOND),)


def test_clearing_another_conversation_leaves_the_answer_alone(session: Session) -> None:
    answered(session, "To be cleared")
    cleared = session.current.id
    session.new()
    request = session.begin_turn(FIRST)
    session.open(cleared)
    session.clear()
    assert session.finish_turn(finished(request.turn, "The Brenner.", 1))


def test_another_process_deletes_a_conversation_that_is_answered(
    session: Session, path: Path, clock: Clock
) -> None:
    for end in ("finish", "fail", "abandon"):
        request = session.begin_turn(f"{FIRST} {end}")
        session.keep_partial(piece(request.turn, "The ", 1))
        with closing(Store(path)) as other:
            other.delete(request.conversation)
        clock.now += PARTIAL_EVERY_S
        session.keep_partial(piece(request.turn, "Bren", 2))
        if end == "finish":
            assert session.finish_turn(finished(request.turn, "The Brenner.", 1, 2)) is None
        elif end == "fail":
            session.fail_turn(request.turn)
        else:
            session.abandon_turn()
        assert all_messages(path) == 0
        session.new()


def test_another_process_deletes_the_open_conversation(session: Session, path: Path) -> None:
    answered(session, FIRST)
    with closing(Store(path)) as other:
        other.delete(session.current.id)
    with pytest.raises(KvchatError, match="deleted by another kvchat"):
        session.begin_turn(SECOND)
    with pytest.raises(KvchatError, match="deleted by another kvchat"):
        session.regenerate()
    assert session.conversations() == []
    session.new()
    answered(session, SECOND)


# branches


def test_regenerating_starts_a_branch_and_keeps_the_old_one(session: Session, path: Path) -> None:
    first = answered(session, FIRST)
    before = session.current.messages[0]
    request = session.regenerate()
    assert request.messages[1:] == (PromptMessage("user", FIRST),)
    assert talk(on_disk(path, request.conversation).messages) == [("user", FIRST, None)]
    second = session.finish_turn(finished(request.turn, "The Gotthard.", 3))
    assert second
    assert (second.parent_id, second.id != first.id) == (first.parent_id, True)
    assert on_disk(path, request.conversation).messages == session.current.messages == (before, second)
    with closing(Store(path)) as store:
        store.set_head(request.conversation, first.id)
        assert store.load(request.conversation).messages == (before, first)


def test_regenerating_answers_a_question_that_has_no_answer(session: Session) -> None:
    failed = session.begin_turn(FIRST)
    session.fail_turn(failed.turn)
    again = session.regenerate()
    assert again.messages == failed.messages
    assert again.turn != failed.turn


def test_there_is_nothing_to_regenerate_at_first_and_after_clear(session: Session) -> None:
    with pytest.raises(KvchatError, match="no answer to write again"):
        session.regenerate()
    answered(session, FIRST)
    session.clear()
    with pytest.raises(KvchatError, match="no answer to write again"):
        session.regenerate()


def test_clear_starts_over_and_keeps_the_old_messages_as_a_branch(session: Session, path: Path) -> None:
    old = answered(session, FIRST)
    title = session.current.title
    session.clear()
    assert on_disk(path, session.current.id).messages == ()
    new = answered(session, SECOND)
    assert talk(session.current.messages)[0] == ("user", SECOND, None)
    assert (session.current.messages[0].parent_id, session.current.title) == (None, title)
    with closing(Store(path)) as store:
        assert store.load(session.current.id).head == new
        store.set_head(session.current.id, old.id)
        assert store.load(session.current.id).head == old


def test_clear_of_an_unsaved_conversation_saves_nothing(session: Session) -> None:
    session.clear()
    assert session.conversations() == []


# settings, titles, drafts


def test_configure_is_saved_and_holds_from_the_next_turn_on(session: Session, path: Path) -> None:
    answered(session, FIRST)
    sampling = Sampling(temperature=0.9, top_k=7, max_tokens=3)
    session.configure(mode=CacheMode.OFF, system_prompt="Sing.", sampling=sampling, model="other")
    saved = on_disk(path, session.current.id)
    assert (saved.mode, saved.system_prompt, saved.sampling, saved.model) == (
        CacheMode.OFF,
        "Sing.",
        sampling,
        "other",
    )
    request = session.begin_turn(SECOND)
    assert (request.mode, request.sampling) == (CacheMode.OFF, sampling)
    assert request.messages[0] == PromptMessage("system", "Sing.")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mode": CacheMode.ON}, {"mode": CacheMode.ON}),
        ({"system_prompt": ""}, {"system_prompt": ""}),
        ({"sampling": Sampling()}, {"sampling": Sampling()}),
        ({"model": "other"}, {"model": "other"}),
        ({}, {}),
    ],
)
def test_configure_changes_one_thing_at_a_time(
    session: Session, path: Path, given: dict[str, object], expected: dict[str, object]
) -> None:
    answered(session, FIRST)
    before = session.current
    session.configure(**given)  # type: ignore[arg-type]
    assert session.current == replace(before, **expected)  # type: ignore[arg-type]
    assert on_disk(path, before.id) == session.current


def test_settings_of_an_unsaved_conversation_come_with_its_first_message(
    session: Session, path: Path
) -> None:
    session.configure(mode=CacheMode.ON)
    assert session.conversations() == []
    answered(session, FIRST)
    assert on_disk(path, session.current.id).mode is CacheMode.ON
    assert session.new().mode is DEFAULTS.mode


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("\n  Which pass?  \nIn May.", "Which pass?"),
        ("word " * 30, "word " * 8 + "word…"),
        (" \n", ""),
        ("山" * 60, "山" * 48 + "…"),
    ],
)
def test_the_first_question_gives_the_title(session: Session, path: Path, question: str, title: str) -> None:
    answered(session, question)
    answered(session, "Another question")
    assert session.current.title == title
    assert on_disk(path, session.current.id).title == title


def test_rename(session: Session, path: Path) -> None:
    answered(session, FIRST)
    first = session.current
    session.new()
    session.rename(first.id, "  The\n pass ")
    assert (on_disk(path, first.id).title, session.current.title) == ("The pass", "")
    session.open(first.id)
    session.rename(first.id, "Alps")
    assert session.current == replace(first, title="Alps") == on_disk(path, first.id)
    session.rename(first.id, " \n ")
    assert on_disk(path, first.id).title == "Alps"


def test_each_conversation_has_its_draft_and_so_has_the_unsaved_one(session: Session, path: Path) -> None:
    session.save_draft("not sent yet")
    assert session.new()
    assert session.draft() == "not sent yet"
    session.save_draft("")
    answered(session, FIRST)
    first = session.current.id
    assert session.draft() == ""
    session.save_draft("of the first")
    session.new()
    session.save_draft("of a new one")
    with closing(Store(path)) as store:
        later = Session(store, DEFAULTS)
        assert later.draft() == "of a new one"
        later.open(first)
        assert later.draft() == "of the first"


def test_open_latest_opens_the_one_used_last(session: Session) -> None:
    empty = session.open_latest()
    assert (empty.messages, empty.model) == ((), DEFAULTS.model)
    answered(session, FIRST)
    first = session.current.id
    session.new()
    answered(session, SECOND)
    second = session.current.id
    session.new()
    assert session.open_latest().id == second
    session.open(first)
    answered(session, "More")
    session.new()
    assert session.open_latest().id == first


def test_open_takes_the_beginning_of_an_id_and_stays_where_it_is_otherwise(session: Session) -> None:
    answered(session, FIRST)
    saved = session.current
    new = session.new()
    with pytest.raises(KvchatError, match="No conversation starts with 'nope'"):
        session.open("nope")
    assert session.current == new
    assert session.open(saved.id[:5]) == saved


def test_new_conversations_have_ids_of_their_own(session: Session) -> None:
    ids = {session.new().id for _ in range(100)}
    assert len(ids) == 100
