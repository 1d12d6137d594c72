"""Turns without a screen, on an engine that plays what is written down."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace

import pytest

from kvchat.chat.conversation import Conversation
from kvchat.chat.session import ConversationDefaults, Session
from kvchat.chat.store import Store
from kvchat.cli.run import figures, run_turns
from kvchat.contract import (
    CacheCommand,
    CacheEvent,
    CacheEventKind,
    PoolState,
    PrefillProgress,
    TokenSpan,
    TokenStatus,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from kvchat.errors import KvchatError
from kvchat.system.interrupts import Ended
from tests.support import samples
from tests.support.samples import FIGURES, piece

Printed = pytest.CaptureFixture[str]


class PlayedEngine(samples.PlayedEngine):
    """An engine that plays turns; its caches can't be acted upon."""

    def command(self, command: CacheCommand) -> None:
        raise AssertionError(f"a turn without a screen sends no cache commands: {command}")


def finished(
    turn: str, text: str, *ids: int, finish: str = "stop", events: tuple[CacheEvent, ...] = ()
) -> TurnFinished:
    """The end of a turn."""
    ended = samples.finished(turn, text, *ids, finish=finish)
    return replace(ended, pool=PoolState((), 0, 0, 0, 0, events))


STARTED = TurnStarted("", 30, 20, 10, "")
BRENNER = (STARTED, PrefillProgress("", 10, 10), piece("", "The ", 1), piece("", "Brenner.", 2))
ANSWER = (*BRENNER, finished("", "The Brenner.", 1, 2))


@pytest.fixture
def session() -> Iterator[Session]:
    with closing(Store(None)) as store:
        yield Session(store, ConversationDefaults())


def talk(conversation: Conversation) -> list[tuple[str, str, str | None]]:
    return [(m.role, m.text, m.finish_reason) for m in conversation.messages]


def reloaded(session: Session) -> Conversation:
    """The open conversation as it is saved."""
    return session.open(session.current.id)


def test_text_goes_to_stdout_and_figures_to_stderr(session: Session, capsys: Printed) -> None:
    assert run_turns(session, PlayedEngine(ANSWER), ["Which pass?"], as_json=False) == 0
    out, err = capsys.readouterr()
    assert out == "The Brenner.\n"
    assert err == f"[{figures(FIGURES)} · {session.current.id}]\n"


def test_json_is_one_object_a_turn(session: Session, capsys: Printed) -> None:
    second = (STARTED, piece("", "3 h\n\x1b", 3), finished("", "3 h\n\x1b", 3, finish="length"))
    assert run_turns(session, PlayedEngine(ANSWER, second), ["Which?", "How long?"], as_json=True) == 0
    out, err = capsys.readouterr()
    assert err == ""
    talk = session.current.id
    assert [json.loads(line) for line in out.splitlines()] == [
        {"text": "The Brenner.", "conversation": talk, "stats": asdict(FIGURES)},
        {
            "text": "3 h\n\x1b",
            "conversation": talk,
            "stats": asdict(replace(FIGURES, finish_reason="length")),
        },
    ]


def test_prompts_are_turns_of_one_conversation(session: Session) -> None:
    engine = PlayedEngine(ANSWER, ANSWER)
    run_turns(session, engine, ["Which pass?", "And now?"], as_json=False)
    assert [[m.text for m in request.messages] for request in engine.requests] == [
        ["Which pass?"],
        ["Which pass?", "The Brenner.", "And now?"],
    ]
    assert talk(reloaded(session)) == [
        ("user", "Which pass?", None),
        ("assistant", "The Brenner.", "stop"),
        ("user", "And now?", None),
        ("assistant", "The Brenner.", "stop"),
    ]


def test_what_happened_to_the_cache_is_saved_with_each_turn(session: Session) -> None:
    talk = session.current.id
    events = [CacheEvent(talk, kind, 20, at=n) for n, kind in enumerate(CacheEventKind)]
    turns = [(*BRENNER, finished("", "The Brenner.", 1, 2, events=(event,))) for event in events]
    run_turns(session, PlayedEngine(*turns), ["Which pass?"] * len(turns), as_json=True)
    assert session.events() == events


def test_terminal_escapes_of_the_model_are_not_printed(session: Session, capsys: Printed) -> None:
    text = "\x1b]0;owned\x07red\n"
    engine = PlayedEngine((STARTED, piece("", text, 1), finished("", text, 1)))
    run_turns(session, engine, ["Which pass?"], as_json=False)
    assert capsys.readouterr().out == "]0;ownedred\n\n"
    assert reloaded(session).messages[-1].text == text


def test_text_is_shown_while_it_is_written(session: Session, capsys: Printed) -> None:
    class Looking(PlayedEngine):
        seen = ""

        def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
            for event in super().turn(request):
                self.seen += capsys.readouterr().out + "|"
                yield event

    engine = Looking(ANSWER)
    run_turns(session, engine, ["Which pass?"], as_json=False)
    assert engine.seen == "|||The |Brenner.|"


def test_a_failed_turn_is_an_error_and_ends_the_run(session: Session, capsys: Printed) -> None:
    engine = PlayedEngine(ANSWER, (STARTED, piece("", "Three", 3), TurnFailed("", "No memory left.")), ANSWER)
    with pytest.raises(KvchatError, match="No memory left"):
        run_turns(session, engine, ["Which pass?", "How long?", "Never asked"], as_json=False)
    assert capsys.readouterr().out == "The Brenner.\nThree"
    assert talk(reloaded(session))[2:] == [("user", "How long?", None), ("assistant", "Three", "error")]
    assert len(engine.requests) == 2


def test_an_engine_that_says_no_end_is_an_error_and_the_text_stays(session: Session) -> None:
    with pytest.raises(KvchatError, match="without an answer"):
        run_turns(session, PlayedEngine(BRENNER), ["Which pass?"], as_json=False)
    assert talk(reloaded(session))[1:] == [("assistant", "The Brenner.", "cancelled")]
    assert session.pending is None


def test_an_answer_whose_reader_is_gone_stays(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_reads(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", nobody_reads)
    with pytest.raises(BrokenPipeError):
        run_turns(session, PlayedEngine(ANSWER), ["Which pass?"], as_json=False)
    assert talk(reloaded(session))[1:] == [("assistant", "The ", "cancelled")]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_this_turn_and_later_ones_are_not_asked(
    session: Session, sent: signal.Signals
) -> None:
    class Interrupted(PlayedEngine):
        def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
            for event in super().turn(request):
                yield event
                if event == piece(request.turn, "The ", 1):
                    os.kill(os.getpid(), sent)
                    yield finished(request.turn, "The ", 1, finish="cancelled")

    engine = Interrupted(ANSWER, ANSWER)
    before = signal.getsignal(sent)
    assert run_turns(session, engine, ["Which pass?", "Never asked"], as_json=False) == 128 + sent
    assert signal.getsignal(sent) is before
    assert engine.stopped == [engine.requests[0].turn]
    assert talk(reloaded(session)) == [("user", "Which pass?", None), ("assistant", "The ", "cancelled")]


def test_a_second_signal_does_not_wait_for_the_engine_and_the_answer_stays(session: Session) -> None:
    class Deaf(PlayedEngine):
        def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
            for event in super().turn(request):
                yield event
                if event == piece(request.turn, "The ", 1):
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Ended) as caught:
        run_turns(session, Deaf(ANSWER), ["Which pass?"], as_json=False)
    assert caught.value.number == signal.SIGINT
    assert talk(reloaded(session)) == [("user", "Which pass?", None), ("assistant", "The ", "cancelled")]


@pytest.mark.parametrize("as_json", [False, True])
def test_an_answer_that_cannot_be_saved_is_printed_whole_before_the_failure_is_reported(
    session: Session, capsys: Printed, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def full(*_: object) -> None:
        raise KvchatError("The conversations can't be saved: database or disk is full.")

    monkeypatch.setattr(session, "keep_partial", full)
    monkeypatch.setattr(session, "finish_turn", full)
    with pytest.raises(KvchatError, match="disk is full"):
        run_turns(session, PlayedEngine(ANSWER), ["Which pass?", "Never asked"], as_json=as_json)
    out = capsys.readouterr().out
    assert (json.loads(out)["text"] if as_json else out) == "The Brenner." + "\n" * (not as_json)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "cache on · reused 20 · read 10 · wrote 4 tokens · "),
        ({}, " · TTFT 0.12 s · prefill 100 tok/s · decode 10.0 tok/s · KV 0.0 MB · context 34/1,024 · "),
        ({}, " · system prompt edited"),
        ({"finish_reason": "length"}, " · ended: length"),
        (
            {"cache_mode": "off", "reused_tokens": 0, "prefilled_tokens": 12_345},
            "cache off · reused 0 · read 12,345",
        ),
        ({"kv_used_bytes": 31_040_000}, " · KV 31.0 MB · "),
    ],
)
def test_the_line_of_figures(changes: dict[str, object], shown: str) -> None:
    assert shown in figures(replace(FIGURES, **changes))  # type: ignore[arg-type]


def test_a_turn_that_simply_ended_says_no_more_than_figures() -> None:
    line = figures(replace(FIGURES, reuse_note=""))
    assert line.endswith("context 34/1,024")
    assert "ended" not in line


def test_the_interrupt_handler_is_back_after_a_failure(session: Session) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KvchatError):
        run_turns(session, PlayedEngine((TurnFailed("", "No."),)), ["Which pass?"], as_json=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_failed_turn_did_is_known(session: Session) -> None:
    spans = (TokenSpan(0, TokenStatus.READ, 6),)
    engine = PlayedEngine((replace(STARTED, spans=spans), TurnFailed("", "No memory left.")))
    with pytest.raises(KvchatError):
        run_turns(session, engine, ["Which pass?"], as_json=False)
    question = reloaded(session).messages[0]
    assert question.not_sent
    assert session.last_turn == {question.id: {TokenStatus.READ: 6}}


def test_a_conversation_goes_on_without_the_prompt_that_failed(session: Session) -> None:
    engine = PlayedEngine(ANSWER, (TurnFailed("", "Too long."),), ANSWER)
    with pytest.raises(KvchatError, match="Too long"):
        run_turns(session, engine, ["Which pass?", "All of it"], as_json=False)
    reloaded(session)
    assert run_turns(session, engine, ["And now?"], as_json=False) == 0
    assert [m.text for m in engine.requests[-1].messages] == ["Which pass?", "The Brenner.", "And now?"]
