"""The conductor: everything is saved before anything happens with it, however a turn ends."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kvchat.chat import session as session_module
from kvchat.chat.active_turn import NotSent
from kvchat.chat.conversation import Conversation, Message, Preset
from kvchat.chat.session import PARTIAL_EVERY_S, ConversationDefaults, Session
from kvchat.chat.store import Store
from kvchat.chat.token_status import ANSWER, TokenStatuses
from kvchat.contract import (
    CacheEvent,
    CacheEventKind,
    CacheMode,
    EvictionPolicy,
    KVPrecision,
    PoolState,
    PromptMessage,
    Sampling,
    TokenSpan,
    TokenStatus,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from kvchat.errors import KvchatError
from tests.support.samples import FIGURES, TOKENIZER, piece

DEFAULTS = ConversationDefaults(
    "maker/model",
    "Be brief.",
    CacheMode.TURN,
    Sampling(temperature=0.3, seed=5),
    KVPrecision.INT8,
    EvictionPolicy.SINKS,
)
FIRST, SECOND = "Which pass is open?", "How long is the drive?"
OTHER_TOKENIZER = "fedcba9876543210"


@dataclass
class Clock:
    """Stands in for the `time` module; the test moves it."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


def finished(
    turn: str,
    text: str,
    *ids: int,
    finish: str = "stop",
    tokenizer: str = TOKENIZER,
    evicted_messages: int = 0,
    events: tuple[CacheEvent, ...] = (),
    spans: tuple[TokenSpan, ...] = (),
) -> TurnFinished:
    """The end of a turn."""
    pool = PoolState((), 0, 0, 0, 0, events)
    figures = replace(FIGURES, finish_reason=finish)
    return TurnFinished(turn, text, ids, tokenizer, figures, pool, evicted_messages, spans)


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


def answered(
    session: Session,
    question: str,
    text: str = "The Brenner.",
    *,
    finish: str = "stop",
    evicted_messages: int = 0,
) -> Message:
    """A whole turn; returns its answer."""
    request = session.begin_turn(question)
    session.keep_partial(piece(request.turn, text, 1, 2))
    message = session.finish_turn(
        finished(request.turn, text, 1, 2, finish=finish, evicted_messages=evicted_messages)
    )
    assert message
    return message


def unanswered(session: Session, question: str) -> None:
    """A question that is read together with the next one, as in a file from before questions were marked."""
    head = session.current.head
    if head is None:
        session._here.create(session.current)
    session._here.add_message(session.current.id, Message(0, head.id if head else None, "user", question, ""))
    session.open(session.current.id)


def asked(request: TurnRequest) -> list[str]:
    """The texts that an engine gets to read, system prompt aside."""
    return [m.text for m in request.messages if m.role != "system"]


def all_messages(path: Path) -> int:
    """Of every branch."""
    with closing(Store(path)) as store:
        return sum(summary.messages for summary in store.summaries())


def begun(session: Session, question: str) -> str:
    """A turn that reads its question, with the system prompt before it; returns the turn."""
    turn = session.begin_turn(question).turn
    spans = (
        TokenSpan(0, TokenStatus.REUSED, 9),
        TokenSpan(len(session.current.messages), TokenStatus.READ, 6),
    )
    session.note_started(TurnStarted(turn, 15, 9, 6, "", spans=spans))
    return turn


def last_turn(path: Path, conversation: str) -> TokenStatuses:
    """What the last turn did, as the next start of the program finds it."""
    with closing(Store(path)) as store:
        again = Session(store, DEFAULTS)
        again.open(conversation)
        return again.last_turn


# how a turn goes


def test_the_question_is_on_disk_before_the_request_leaves(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    saved = on_disk(path, request.conversation)
    assert talk(saved.messages) == [("user", FIRST, None)]
    assert (saved.model, saved.system_prompt, saved.mode, saved.sampling, saved.kv, saved.policy) == (
        DEFAULTS.model,
        DEFAULTS.system_prompt,
        DEFAULTS.mode,
        DEFAULTS.sampling,
        DEFAULTS.kv,
        DEFAULTS.policy,
    )
    assert request.messages == (PromptMessage("system", "Be brief."), PromptMessage("user", FIRST))
    assert (request.mode, request.sampling) == (CacheMode.TURN, DEFAULTS.sampling)
    assert (request.kv, request.policy, request.evicted_messages) == (
        KVPrecision.INT8,
        EvictionPolicy.SINKS,
        0,
    )


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


def test_a_turn_that_failed_at_once_leaves_the_question_and_no_later_prompt_has_it(
    session: Session, path: Path
) -> None:
    request = session.begin_turn(FIRST)
    assert session.fail_turn(request.turn) == NotSent(request.conversation, FIRST)
    (question,) = on_disk(path, request.conversation).messages
    assert (question.text, question.not_sent, session.current.messages) == (FIRST, True, (question,))
    again = session.begin_turn(SECOND)
    assert again.messages[1:] == (PromptMessage("user", SECOND),)


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


def test_what_a_turn_does_is_told_while_it_is_under_way_and_stays_when_it_is_over(
    session: Session, path: Path, clock: Clock
) -> None:
    turn = begun(session, FIRST)
    question = session.current.messages[0].id
    assert session.last_turn == {question: {TokenStatus.READ: 6}}
    session.keep_partial(piece(turn, "The ", 1))
    assert session.last_turn == {question: {TokenStatus.READ: 6}, ANSWER: {TokenStatus.WRITTEN: 1}}
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(turn, "Bren", 2))
    saved = session.current.messages[-1].id
    assert session.last_turn == {question: {TokenStatus.READ: 6}, saved: {TokenStatus.WRITTEN: 2}}
    spans = (TokenSpan(1, TokenStatus.EVICTED, 6), TokenSpan(2, TokenStatus.WRITTEN, 2))
    message = session.finish_turn(finished(turn, "The Brenner.", 1, 2, spans=spans))
    assert message
    told = {question: {TokenStatus.EVICTED: 6}, message.id: {TokenStatus.WRITTEN: 2}}
    assert session.last_turn == last_turn(path, session.current.id) == told


def test_each_conversation_has_its_own_last_turn_also_one_that_is_answered_meanwhile(
    session: Session, path: Path
) -> None:
    turn = begun(session, FIRST)
    asked_in, question = session.current.id, session.current.messages[0].id
    session.new()
    assert session.last_turn == {}
    message = session.finish_turn(finished(turn, "Yes.", 1, spans=(TokenSpan(2, TokenStatus.WRITTEN, 1),)))
    assert message
    assert session.last_turn == {}
    session.open(asked_in)
    assert session.last_turn == {message.id: {TokenStatus.WRITTEN: 1}}
    session.fork()
    assert session.last_turn == {}
    assert question in {m.id for m in on_disk(path, asked_in).messages}


@pytest.mark.parametrize(
    "end", [Session.abandon_turn, lambda session: session.fail_turn(session.pending.turn)]
)
@pytest.mark.parametrize("text", ["", "The "])
def test_a_turn_that_broke_off_is_the_last_one_too(
    session: Session, path: Path, end: Callable[[Session], None], text: str
) -> None:
    turn = begun(session, FIRST)
    if text:
        session.keep_partial(piece(turn, text, 1))
    end(session)
    question, *rest = session.current.messages
    told = {question.id: {TokenStatus.READ: 6}, **{m.id: {TokenStatus.WRITTEN: 1} for m in rest}}
    assert len(rest) == bool(text)
    assert session.last_turn == last_turn(path, session.current.id) == told


def test_a_turn_that_broke_off_before_it_was_planned_did_nothing(session: Session, path: Path) -> None:
    message = answered(session, FIRST)
    session._save_last_turn(session.current.id, {message.id: {TokenStatus.WRITTEN: 2}})
    session.begin_turn(SECOND)
    session.abandon_turn()
    assert last_turn(path, session.current.id) == {message.id: {TokenStatus.WRITTEN: 2}}


def test_the_last_turn_of_a_private_conversation_is_not_written(session: Session, path: Path) -> None:
    private = session.new_private().id
    turn = begun(session, FIRST)
    session.finish_turn(finished(turn, "Yes.", 1, spans=(TokenSpan(2, TokenStatus.WRITTEN, 1),)))
    session.new()
    session.open(private)
    assert list(session.last_turn.values()) == [{TokenStatus.WRITTEN: 1}]
    with closing(Store(path)) as store:
        assert store.last_turn(private) == {}


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
    question = session.current.messages[0].id
    acts: list[Callable[[], object]] = [
        lambda: session.begin_turn(SECOND),
        session.regenerate,
        session.undo,
        lambda: session.edit(question, SECOND),
        session.continue_answer,
        session.fork,
    ]
    for act in acts:
        with pytest.raises(KvchatError, match="still being written"):
            act()
    assert talk(session.current.messages) == [("user", FIRST, None)]
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
    answered(session, FIRST, finish="length")
    before = session.current
    question = before.messages[0].id
    with closing(Store(path)) as other:
        other.delete(session.current.id)
    acts: list[Callable[[], object]] = [
        lambda: session.begin_turn(SECOND),
        session.regenerate,
        session.undo,
        lambda: session.edit(question, SECOND),
        session.continue_answer,
        session.fork,
    ]
    for act in acts:
        with pytest.raises(KvchatError, match="deleted by another kvchat"):
            act()
    assert (session.conversations(), session.current, session.pending) == ([], before, None)
    session.new()
    answered(session, SECOND)


# branches


def test_regenerating_starts_a_branch_and_keeps_the_old_one(session: Session, path: Path) -> None:
    first = answered(session, FIRST)
    before = session.current.messages[0]
    request = session.regenerate()
    assert request.messages[1:] == (PromptMessage("user", FIRST),)
    assert talk(session.current.messages) == [("user", FIRST, None)]
    assert on_disk(path, request.conversation).messages == (before, first)
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


def test_undo_takes_the_last_question_back_and_keeps_it_as_a_branch(session: Session, path: Path) -> None:
    first = answered(session, FIRST)
    second = answered(session, SECOND)
    assert session.undo() == SECOND
    saved = on_disk(path, session.current.id)
    assert saved == session.current
    assert saved.head == first
    answered(session, "Why?")
    assert session.current.messages[2].parent_id == first.id
    assert all_messages(path) == 6
    with closing(Store(path)) as store:
        store.set_head(saved.id, second.id)
        assert [m.text for m in store.load(saved.id).messages[2:]] == [SECOND, "The Brenner."]


def test_undo_goes_back_question_by_question_until_there_is_none(session: Session) -> None:
    answered(session, FIRST)
    failed = session.begin_turn(SECOND)
    session.fail_turn(failed.turn)
    assert [session.undo(), session.undo()] == [SECOND, FIRST]
    assert session.current.messages == ()
    with pytest.raises(KvchatError, match="no question to take back"):
        session.undo()
    assert asked(session.begin_turn("Again")) == ["Again"]


def test_editing_a_question_answers_it_on_a_branch_beside_the_old_one(session: Session, path: Path) -> None:
    first = answered(session, FIRST)
    second = answered(session, SECOND)
    third = answered(session, "Why?")
    (_, _, question, *_) = session.current.messages
    request = session.edit(question.id, "How far is it?")
    assert asked(request) == [FIRST, "The Brenner.", "How far is it?"]
    edited = session.finish_turn(finished(request.turn, "Far.", 5))
    assert edited
    saved = on_disk(path, request.conversation)
    assert talk(saved.messages)[2:] == [("user", "How far is it?", None), ("assistant", "Far.", "stop")]
    assert saved.messages[2].parent_id == question.parent_id == first.id
    with closing(Store(path)) as store:
        store.set_head(request.conversation, third.id)
        old = store.load(saved.id).messages
    assert (old[3], old[5]) == (second, third)
    assert [m.text for m in old[::2]] == [FIRST, SECOND, "Why?"]


def test_editing_the_first_question_keeps_conversation_and_title(session: Session, path: Path) -> None:
    answered(session, FIRST)
    before = session.current
    request = session.edit(before.messages[0].id, SECOND)
    session.finish_turn(finished(request.turn, "Three hours.", 3))
    assert (session.current.id, session.current.title) == (before.id, before.title)
    assert [s.id for s in session.conversations()] == [before.id]
    assert on_disk(path, before.id).messages[0].parent_id is None


def test_only_a_question_of_the_open_conversation_can_be_edited(session: Session, path: Path) -> None:
    elsewhere = answered(session, FIRST)
    session.new()
    answer = answered(session, SECOND)
    before = session.current
    for message in (answer.id, elsewhere.id, elsewhere.parent_id or 0, 10_000):
        with pytest.raises(KvchatError, match="Only a question of this conversation"):
            session.edit(message, "Edited")
    assert session.current == before == on_disk(path, before.id)
    assert all_messages(path) == 4


# answers that go on


@pytest.mark.parametrize("finish", ["length", "cancelled", "context", "error"])
def test_an_answer_that_was_cut_off_goes_on_in_the_same_message(
    session: Session, path: Path, clock: Clock, finish: str
) -> None:
    begun = answered(session, FIRST, "The Bren", finish=finish)
    request = session.continue_answer()
    assert request.messages[-1] == PromptMessage("assistant", "The Bren", (1, 2), TOKENIZER)
    assert session.pending
    assert session.pending.text == "The Bren"
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(request.turn, "ner is", 3))
    partial = on_disk(path, request.conversation).head
    assert partial == session.current.head
    assert partial
    assert (partial.id, partial.text, partial.token_ids) == (begun.id, "The Brenner is", (1, 2, 3))
    assert partial.finish_reason is None
    session.keep_partial(piece(request.turn, " open.", 4, 5))
    message = session.finish_turn(finished(request.turn, "ner is open.", 3, 4, 5))
    assert message
    saved = on_disk(path, request.conversation)
    assert saved == session.current
    assert saved.messages[1:] == (message,)
    assert (message.id, message.parent_id) == (begun.id, begun.parent_id)
    assert (message.text, message.token_ids) == ("The Brenner is open.", (1, 2, 3, 4, 5))
    assert (message.tokenizer, message.finish_reason, message.stats) == (TOKENIZER, "stop", FIGURES)


def test_an_answer_may_go_on_more_than_once_and_then_the_talk_does(session: Session) -> None:
    answered(session, FIRST, "a", finish="length")
    for text, token in (("b", 3), ("c", 4)):
        request = session.continue_answer()
        session.keep_partial(piece(request.turn, text, token))
        session.finish_turn(finished(request.turn, text, token, finish="length"))
    request = session.begin_turn(SECOND)
    assert request.messages[2:] == (
        PromptMessage("assistant", "abc", (1, 2, 3, 4), TOKENIZER),
        PromptMessage("user", SECOND),
    )


def test_an_answer_that_another_model_goes_on_with_is_text_without_ids(
    session: Session, path: Path, clock: Clock
) -> None:
    answered(session, FIRST, "The Bren", finish="length")
    for text, whole in (("ner", "The Brenner"), (" is open.", "The Brenner is open.")):
        request = session.continue_answer()
        clock.now += PARTIAL_EVERY_S
        session.keep_partial(replace(piece(request.turn, text, 7), tokenizer=OTHER_TOKENIZER))
        ended = finished(request.turn, text, 7, tokenizer=OTHER_TOKENIZER, finish="length")
        for message in (on_disk(path, request.conversation).head, session.finish_turn(ended)):
            assert message
            assert (message.text, message.token_ids, message.tokenizer) == (whole, (), OTHER_TOKENIZER)


@pytest.mark.parametrize("end", ["fail", "abandon"])
def test_an_answer_that_went_on_and_broke_off_keeps_both_parts(
    session: Session, path: Path, end: str
) -> None:
    answered(session, FIRST, "The Bren", finish="length")
    request = session.continue_answer()
    session.keep_partial(piece(request.turn, "ner", 3))
    if end == "fail":
        session.fail_turn(request.turn)
    else:
        session.abandon_turn()
    head = on_disk(path, request.conversation).head
    assert head == session.current.head
    assert head
    assert (head.text, head.token_ids) == ("The Brenner", (1, 2, 3))
    assert head.finish_reason == {"fail": "error", "abandon": "cancelled"}[end]
    assert all_messages(path) == 2


@pytest.mark.parametrize("end", ["fail", "abandon"])
def test_going_on_that_brought_nothing_leaves_the_answer_as_it_was(
    session: Session, path: Path, end: str
) -> None:
    before = answered(session, FIRST, "The Bren", finish="length")
    request = session.continue_answer()
    if end == "fail":
        session.fail_turn(request.turn)
    else:
        session.abandon_turn()
    assert on_disk(path, request.conversation).head == session.current.head == before
    assert session.continue_answer().messages == request.messages


def test_an_answer_that_a_crash_cut_off_goes_on(session: Session, path: Path, clock: Clock) -> None:
    request = session.begin_turn(FIRST)
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(request.turn, "The Bren", 1, 2))
    with closing(Store(path)) as store:
        later = Session(store, DEFAULTS)
        later.open_latest()
        again = later.continue_answer()
        message = later.finish_turn(finished(again.turn, "ner.", 3))
        assert message
        assert (message.text, message.token_ids) == ("The Brenner.", (1, 2, 3))


def test_what_ended_by_itself_and_what_is_no_answer_does_not_go_on(session: Session) -> None:
    with pytest.raises(KvchatError, match="no answer to go on with"):
        session.continue_answer()
    request = session.begin_turn(FIRST)
    session.fail_turn(request.turn)
    with pytest.raises(KvchatError, match="no answer to go on with"):
        session.continue_answer()
    answered(session, SECOND)
    with pytest.raises(KvchatError, match="ended this answer itself"):
        session.continue_answer()
    assert session.pending is None


# forks


def test_a_fork_is_a_copy_and_the_parent_stays_as_it_was(session: Session, path: Path) -> None:
    answered(session, FIRST)
    answered(session, SECOND, finish="length")
    session.configure(kv=KVPrecision.BF16)
    parent = session.current
    fork = session.fork()
    assert fork == session.current == on_disk(path, fork.id)
    assert fork.id != parent.id
    assert replace(fork, id=parent.id, title=parent.title, messages=()) == replace(parent, messages=())
    assert fork.title == f"{parent.title} (fork)"
    ids = [m.id for m in fork.messages]
    assert [m.parent_id for m in fork.messages] == [None, *ids[:-1]]
    assert not set(ids) & {m.id for m in parent.messages}
    same = [replace(m, id=0, parent_id=None) for m in parent.messages]
    assert [replace(m, id=0, parent_id=None) for m in fork.messages] == same
    assert [m.stats for m in fork.messages][1::2] == [FIGURES, replace(FIGURES, finish_reason="length")]
    answered(session, "Only in the fork")
    assert len(session.current.messages) == 6
    assert on_disk(path, parent.id) == parent
    session.delete(fork.id)
    assert on_disk(path, parent.id) == parent


def test_a_fork_may_end_at_an_earlier_message(session: Session, path: Path) -> None:
    first = answered(session, FIRST)
    answered(session, SECOND)
    fork = session.fork(first.id)
    assert talk(fork.messages) == [("user", FIRST, None), ("assistant", "The Brenner.", "stop")]
    assert asked(session.begin_turn("Elsewhere")) == [FIRST, "The Brenner.", "Elsewhere"]


def test_there_is_nothing_to_fork_at_first_and_after_clear(session: Session) -> None:
    with pytest.raises(KvchatError, match="nothing to fork"):
        session.fork()
    answered(session, FIRST)
    session.clear()
    with pytest.raises(KvchatError, match="nothing to fork"):
        session.fork()
    assert len(session.conversations()) == 1


# what an eviction left out


def test_messages_that_were_left_out_stay_so_over_turns_and_starts(session: Session, path: Path) -> None:
    answered(session, FIRST)
    answered(session, SECOND, evicted_messages=2)
    assert on_disk(path, session.current.id).evicted_messages == session.current.evicted_messages == 2
    with closing(Store(path)) as store:
        later = Session(store, DEFAULTS)
        later.open_latest()
        request = later.begin_turn("Why?")
        assert (request.evicted_messages, len(asked(request))) == (2, 5)
        later.finish_turn(finished(request.turn, "So.", 1, evicted_messages=4))
        assert later.regenerate().evicted_messages == 4
        assert later.request_as_if().evicted_messages == 4


def test_what_is_left_out_of_a_conversation_that_is_not_open_is_saved_too(
    session: Session, path: Path
) -> None:
    answered(session, FIRST)
    request = session.begin_turn(SECOND)
    other = session.new()
    session.finish_turn(finished(request.turn, "Three hours.", 3, evicted_messages=2))
    assert (on_disk(path, request.conversation).evicted_messages, session.current) == (2, other)


def shortened(session: Session) -> Conversation:
    """Three turns of which the first two are left out."""
    for question, evicted_messages in ((FIRST, 0), (SECOND, 2), ("Why?", 4)):
        answered(session, question, evicted_messages=evicted_messages)
    return session.current


def undo_twice(session: Session) -> None:
    session.undo()
    session.undo()


def edit_the_second(session: Session) -> None:
    turn = session.edit(session.current.messages[2].id, "Edited").turn
    session.keep_partial(piece(turn, "Now", 1))
    session.abandon_turn()


def fork_at_the_first(session: Session) -> None:
    session.fork(session.current.messages[1].id)


def clear(session: Session) -> None:
    session.clear()


@pytest.mark.parametrize("go_back", [undo_twice, edit_the_second, fork_at_the_first, clear])
def test_going_back_before_what_was_left_out_leaves_nothing_out(
    session: Session, path: Path, go_back: Callable[[Session], None]
) -> None:
    before = shortened(session)
    go_back(session)
    assert session.current.evicted_messages == 0
    assert on_disk(path, session.current.id).evicted_messages == 0
    if session.current.id != before.id:
        assert on_disk(path, before.id) == before
    assert session.begin_turn("And now?").evicted_messages == 0


def test_going_back_after_what_was_left_out_leaves_it_out(session: Session, path: Path) -> None:
    shortened(session)
    answered(session, "And then?", evicted_messages=4)
    session.undo()
    assert session.begin_turn("And now?").evicted_messages == 4
    session.abandon_turn()
    assert session.fork().evicted_messages == on_disk(path, session.current.id).evicted_messages == 4


def test_questions_without_an_answer_count_as_the_one_message_they_are_read_as(session: Session) -> None:
    for question in ("One", "Two", "Three"):
        unanswered(session, question)
    answered(session, "Four")
    answered(session, SECOND, evicted_messages=2)
    session.undo()
    session.undo()
    assert len(session.current.messages) == 3
    request = session.begin_turn("Five")
    assert (asked(request), request.evicted_messages) == (["One\n\nTwo\n\nThree\n\nFive"], 0)


# what a request carries


def test_every_request_carries_the_date_of_the_first_day(session: Session, path: Path) -> None:
    before = datetime.now(UTC)
    session.new()
    first = session.begin_turn(FIRST)
    assert before <= datetime.fromisoformat(first.today) <= datetime.now(UTC)
    session.finish_turn(finished(first.turn, "The Brenner.", 1))
    with closing(Store(path)) as store:
        later = Session(store, DEFAULTS)
        assert later.open_latest().created_at == first.today
        assert later.begin_turn(SECOND).today == first.today
        later.abandon_turn()
        later.fork()
        assert later.begin_turn(SECOND).today == first.today
        later.abandon_turn()
        assert later.new().created_at > first.today


@pytest.mark.parametrize("private", [False, True])
def test_nothing_of_a_private_conversation_may_be_remembered(private: bool) -> None:
    with closing(Store(None)) as store:
        session = Session(store, ConversationDefaults(private=private))
        request = session.begin_turn(FIRST)
        assert request.persist is not private
        session.finish_turn(finished(request.turn, "The Brenner.", 1))
        assert session.regenerate().persist is not private


def test_a_price_is_asked_of_the_next_turn_with_changes_and_begins_none(session: Session) -> None:
    answered(session, FIRST)
    before = session.current
    request = session.request_as_if(policy=EvictionPolicy.NONE, messages=())
    assert (request.conversation, request.policy, request.messages) == (before.id, EvictionPolicy.NONE, ())
    assert (request.mode, request.sampling, request.kv) == (DEFAULTS.mode, DEFAULTS.sampling, DEFAULTS.kv)
    assert (session.pending, session.current) == (None, before)


# what happens to caches


def test_what_happened_to_caches_is_saved_with_the_answer(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    reuse = CacheEvent(request.conversation, CacheEventKind.REUSE, 12, 0, 0.0, "", 1.0)
    save = CacheEvent(request.conversation, CacheEventKind.SAVE, 0, 4096, 0.25, "", 2.0)
    foreign = CacheEvent("nobody", CacheEventKind.DROP, 5, at=1.5)
    session.finish_turn(finished(request.turn, "The Brenner.", 1, events=(save, foreign, reuse)))
    assert session.events() == [reuse, save]
    restore = replace(reuse, kind=CacheEventKind.RESTORE, at=3.0)
    session.note_events([restore])
    session.note_events([])
    with closing(Store(path)) as store:
        later = Session(store, DEFAULTS)
        later.open_latest()
        assert later.events() == [reuse, save, restore]
        assert later.new()
        assert later.events() == []


def test_what_happened_to_a_private_cache_is_on_its_own_timeline_and_not_on_disk(
    session: Session, path: Path
) -> None:
    answered(session, FIRST)
    public = session.current.id
    private = session.new_private().id
    answered(session, SECOND)
    events = [CacheEvent(name, CacheEventKind.REUSE, 12, at=1.0) for name in (private, public, "nobody")]
    session.note_events(events)
    assert (session.events(), session.events(public)) == (events[:1], events[1:2])
    fork = session.fork()
    session.note_events([replace(events[0], conversation=fork.id, kind=CacheEventKind.FORK)])
    assert [event.kind for event in session.events()] == [CacheEventKind.FORK]
    with closing(Store(path)) as store:
        saved = [store.events(name) for name in (private, public, fork.id)]
        assert saved == [[], events[1:2], []]


def test_private_conversations_are_found_as_the_others_are(session: Session, path: Path) -> None:
    answered(session, FIRST)
    private = session.new_private()
    answered(session, SECOND)
    session.save_draft("a draft")
    assert session.history() == [FIRST, SECOND]
    assert [hit.conversation for hit in session.search(SECOND.split()[:1])][:1] == [private.id]
    session.new()
    assert session.draft() == ""
    assert session.open(private.id[:6]).id == private.id
    assert session.draft() == "a draft"
    with pytest.raises(KvchatError, match="No conversation starts with 'x'"):
        session.open("x")
    with closing(Store(path)) as store:
        assert (store.history(9), store.search(SECOND.split(), 9), store.draft(private.id)) == (
            [FIRST],
            [],
            "",
        )


def test_a_private_conversation_is_here_already_for_an_import(session: Session, path: Path) -> None:
    private = session.new_private()
    answered(session, FIRST)
    exported = session.whole()
    session.new()
    assert session.import_all([exported, replace(exported, id="0123456789ab")]) == 1
    assert sorted(each.private for each in session.conversations()) == [False, True]
    with closing(Store(path)) as store:
        assert [each.id for each in store.summaries()] == ["0123456789ab"]
    assert session.is_private(private.id)


@pytest.mark.parametrize("begun", [True, False])
def test_a_private_conversation_is_still_private_after_the_tour(session: Session, begun: bool) -> None:
    private = session.new_private().id
    if begun:
        answered(session, FIRST)
    session.aside()
    assert not session.is_private(session.current.id)
    answered(session, SECOND)
    session.back()
    assert session.is_private(session.current.id)
    assert (session.current.id == private) is begun


def test_what_happens_to_a_cache_during_the_tour_is_on_its_timeline(session: Session, path: Path) -> None:
    answered(session, FIRST)
    saved = CacheEvent(session.current.id, CacheEventKind.SAVE, 12, at=1.0)
    session.aside()
    answered(session, SECOND)
    during = replace(saved, conversation=session.current.id)
    session.note_events([saved, during])
    assert session.events() == [during]
    session.back()
    assert session.events() == [saved]
    with closing(Store(path)) as store:
        assert store.events(during.conversation) == []


def test_a_preset_is_saved_from_a_private_conversation_too(session: Session, path: Path) -> None:
    """It is no part of a conversation: the user gave it a name to find it again."""
    session.new_private()
    preset = Preset("short", "Be brief.", Sampling())
    session.save_preset(preset)
    with closing(Store(path)) as store:
        assert session.presets() == store.presets() == [preset]


# settings, titles, drafts


def test_configure_is_saved_and_holds_from_the_next_turn_on(session: Session, path: Path) -> None:
    answered(session, FIRST)
    sampling = Sampling(temperature=0.9, top_k=7, max_tokens=3)
    kv, policy = KVPrecision.INT4, EvictionPolicy.SNAPKV
    session.configure(
        mode=CacheMode.OFF, system_prompt="Sing.", sampling=sampling, model="other", kv=kv, policy=policy
    )
    saved = on_disk(path, session.current.id)
    assert (saved.mode, saved.system_prompt, saved.sampling, saved.model, saved.kv, saved.policy) == (
        CacheMode.OFF,
        "Sing.",
        sampling,
        "other",
        kv,
        policy,
    )
    request = session.begin_turn(SECOND)
    assert (request.mode, request.sampling) == (CacheMode.OFF, sampling)
    assert (request.kv, request.policy) == (kv, policy)
    assert request.messages[0] == PromptMessage("system", "Sing.")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mode": CacheMode.ON}, {"mode": CacheMode.ON}),
        ({"system_prompt": ""}, {"system_prompt": ""}),
        ({"sampling": Sampling()}, {"sampling": Sampling()}),
        ({"model": "other"}, {"model": "other"}),
        ({"kv": KVPrecision.BF16}, {"kv": KVPrecision.BF16}),
        ({"policy": EvictionPolicy.NONE}, {"policy": EvictionPolicy.NONE}),
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


def test_a_message_is_opened_on_its_newest_branch_and_that_is_the_shown_one_from_then_on(
    session: Session, path: Path
) -> None:
    first = answered(session, FIRST)
    answered(session, SECOND, "Two hours.")
    session.undo()
    answered(session, "And back?", "Three.")
    turn = session.edit(session.current.messages[0].id, "Which lake?").turn
    session.finish_turn(finished(turn, "Garda.", 1))
    left, shown = session.current.id, session.current.messages[-1].id
    session.new()
    assert not session.open_at(left, shown)
    assert session.open_at(left, first.id)
    texts = [m.text for m in session.current.messages]
    assert texts == [FIRST, "The Brenner.", "And back?", "Three."]
    assert on_disk(path, left) == session.current
    assert not session.open_at(left, first.id)


def test_an_evicted_branch_is_read_whole_where_it_is_shorter_than_what_was_left_out(session: Session) -> None:
    first = answered(session, FIRST)
    session.finish_turn(finished(session.regenerate().turn, "Another.", 1))
    for n in range(3):
        answered(session, f"Question {n}", evicted_messages=3)
    assert session.current.evicted_messages == 3
    session.open_at(session.current.id, first.id)
    assert session.current.evicted_messages == 0


def test_a_message_that_is_gone_and_a_branch_beside_the_one_that_is_answered_are_not_opened(
    session: Session, path: Path
) -> None:
    first = answered(session, FIRST)
    request = session.regenerate()
    left = session.current
    with pytest.raises(KvchatError, match="being written"):
        session.open_at(left.id, first.id)
    other = session.new()
    with pytest.raises(KvchatError, match="being written"):
        session.open_at(left.id, first.id)
    assert session.current == other
    session.finish_turn(finished(request.turn, "Another.", 1))
    with pytest.raises(KvchatError, match="not there any more"):
        session.open_at(left.id, 999)
    session.delete(left.id)
    with pytest.raises(KvchatError, match="no conversation"):
        session.open_at(left.id, first.id)
    assert session.current == other


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


# turns that brought no answer


End = Callable[[Session], NotSent | None]


def fail(session: Session) -> NotSent | None:
    assert session.pending
    return session.fail_turn(session.pending.turn)


ENDS: list[End] = [fail, Session.abandon_turn]


def told(session: Session) -> list[tuple[str, bool]]:
    """What is shown, and whether it was not sent."""
    return [(m.text, m.not_sent) for m in session.current.messages]


@pytest.mark.parametrize("end", ENDS)
def test_what_was_not_sent_is_in_no_later_prompt_not_after_a_restart_either(
    session: Session, path: Path, end: End
) -> None:
    answered(session, FIRST)
    session.begin_turn("Too long")
    end(session)
    session.begin_turn("Too long again")
    end(session)
    shown = [(FIRST, False), ("The Brenner.", False), ("Too long", True), ("Too long again", True)]
    assert told(session) == shown
    assert on_disk(path, session.current.id) == session.current
    with closing(Store(path)) as store:
        later = Session(store, DEFAULTS)
        later.open_latest()
        assert asked(later.request_as_if()) == [FIRST, "The Brenner."]
        assert asked(later.begin_turn(SECOND)) == [FIRST, "The Brenner.", SECOND]


def test_a_question_whose_answer_had_not_begun_at_a_crash_was_not_sent(session: Session, path: Path) -> None:
    session.begin_turn(FIRST)
    with closing(Store(path)) as store:
        later = Session(store, DEFAULTS)
        later.open_latest()
        assert told(later) == [(FIRST, True)]
        assert asked(later.begin_turn(SECOND)) == [SECOND]


def test_the_first_saved_token_makes_a_question_a_sent_one(
    session: Session, path: Path, clock: Clock
) -> None:
    request = session.begin_turn(FIRST)
    assert [m.not_sent for m in on_disk(path, request.conversation).messages] == [True]
    clock.now += PARTIAL_EVERY_S
    session.keep_partial(piece(request.turn, "The", 1))
    assert [m.not_sent for m in on_disk(path, request.conversation).messages] == [False, False]


def test_an_answer_of_tokens_without_text_is_an_answer(session: Session, path: Path) -> None:
    request = session.begin_turn(FIRST)
    session.keep_partial(piece(request.turn, "", 1))
    assert session.fail_turn(request.turn) is None
    saved = on_disk(path, request.conversation)
    assert talk(saved.messages) == [("user", FIRST, None), ("assistant", "", "error")]
    assert told(session) == [(FIRST, False), ("", False)]


def test_a_stop_before_the_first_token_leaves_a_question_with_an_empty_answer(session: Session) -> None:
    request = session.begin_turn(FIRST)
    session.finish_turn(finished(request.turn, "", finish="cancelled"))
    assert told(session) == [(FIRST, False), ("", False)]
    assert [(m.role, m.text) for m in session.begin_turn(SECOND).messages[1:]] == [
        ("user", FIRST),
        ("assistant", ""),
        ("user", SECOND),
    ]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_edit_that_failed_leaves_the_old_question_and_its_answer(
    session: Session, path: Path, end: End, elsewhere: bool
) -> None:
    before = shortened(session)
    session.edit(before.messages[0].id, "Edited")
    assert told(session) == [("Edited", False)]
    if elsewhere:
        session.new()
        end(session)
        session.open(before.id)
    else:
        end(session)
    assert session.current == on_disk(path, before.id) == before
    assert asked(session.begin_turn("And?")) == [*[m.text for m in before.messages], "And?"]


def test_an_edit_that_failed_is_given_back_with_the_question_that_it_replaces(session: Session) -> None:
    answered(session, FIRST)
    question = session.current.messages[0].id
    turn = session.edit(question, "Edited").turn
    assert session.fail_turn(turn) == NotSent(session.current.id, "Edited", question)


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_that_could_not_be_written_again_stays(session: Session, path: Path, end: End) -> None:
    before = shortened(session)
    session.regenerate()
    assert end(session) is None
    assert session.current == on_disk(path, before.id) == before


def test_coming_back_to_an_edit_that_is_answered_shows_its_branch(session: Session) -> None:
    answered(session, FIRST)
    left, turn = session.current.id, session.edit(session.current.messages[0].id, "Edited").turn
    session.new()
    session.open(left)
    assert told(session) == [("Edited", False)]
    session.finish_turn(finished(turn, "Yes.", 1))
    assert told(session) == [("Edited", False), ("Yes.", False)]


def test_regenerating_sends_what_was_not_sent(session: Session, path: Path) -> None:
    answered(session, FIRST)
    fail_turn = session.begin_turn(SECOND).turn
    session.fail_turn(fail_turn)
    request = session.regenerate()
    assert asked(request) == [FIRST, "The Brenner.", SECOND]
    session.fail_turn(request.turn)
    assert told(session)[-1] == (SECOND, True)
    request = session.regenerate()
    session.finish_turn(finished(request.turn, "Three hours.", 3))
    assert told(session)[2:] == [(SECOND, False), ("Three hours.", False)]
    assert on_disk(path, session.current.id) == session.current


def test_going_on_with_an_answer_leaves_what_was_not_sent_after_it(session: Session) -> None:
    answered(session, FIRST, "The Bren", finish="length")
    session.fail_turn(session.begin_turn(SECOND).turn)
    request = session.continue_answer()
    assert asked(request) == [FIRST, "The Bren"]
    session.finish_turn(finished(request.turn, "ner.", 3))
    assert told(session) == [(FIRST, False), ("The Brenner.", False)]


def test_undo_takes_what_was_not_sent_back_first(session: Session) -> None:
    answered(session, FIRST)
    session.fail_turn(session.begin_turn(SECOND).turn)
    assert session.undo() == SECOND
    assert session.undo() == FIRST


def test_a_fork_keeps_the_mark(session: Session, path: Path) -> None:
    answered(session, FIRST)
    session.fail_turn(session.begin_turn(SECOND).turn)
    copy = session.fork()
    assert told(session)[-1] == (SECOND, True)
    assert on_disk(path, copy.id) == copy
    assert asked(session.begin_turn("Why?")) == [FIRST, "The Brenner.", "Why?"]


def test_a_title_comes_from_the_first_question_that_was_sent(session: Session, path: Path) -> None:
    session.fail_turn(session.begin_turn("Too long").turn)
    assert session.current.title == "Too long"
    answered(session, FIRST)
    answered(session, SECOND)
    assert session.current.title == on_disk(path, session.current.id).title == FIRST


def test_a_title_that_was_given_stays(session: Session) -> None:
    session.fail_turn(session.begin_turn("Too long").turn)
    session.rename(session.current.id, "Alps")
    answered(session, FIRST)
    assert session.current.title == "Alps"


def test_a_question_whose_answer_cannot_be_saved_is_in_no_later_prompt(
    session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object, **_named: object) -> None:
        raise KvchatError("The disk is full.")

    request = session.begin_turn(FIRST)
    with monkeypatch.context() as broken:
        broken.setattr(session._store, "add_message", full)
        with pytest.raises(KvchatError, match="full"):
            session.finish_turn(finished(request.turn, "The Brenner.", 1, evicted_messages=2))
    assert on_disk(path, request.conversation) == session.current
    assert (asked(session.begin_turn(SECOND)), session.current.evicted_messages) == ([SECOND], 0)


def test_a_question_of_another_conversation_comes_before_its_draft(session: Session) -> None:
    turn = session.begin_turn(FIRST).turn
    left = session.current.id
    session.save_draft("typed meanwhile")
    session.new()
    not_sent = session.fail_turn(turn)
    assert not_sent
    session.keep_for_later(not_sent)
    session.keep_for_later(not_sent)
    assert session.draft() == ""
    session.open(left)
    assert session.draft() == f"{FIRST}\ntyped meanwhile"
