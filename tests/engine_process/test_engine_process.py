"""The engine in a child process: messages over the pipe, and the end of either process."""

import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import cast

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.cache.disk.disk_store import Chain, DiskStore
from kvchat.contract import (
    CacheCommand,
    CacheEventKind,
    CacheMode,
    Converted,
    CostEstimate,
    Died,
    Drop,
    EstimateCost,
    Fork,
    KVPrecision,
    Loading,
    Pin,
    PoolState,
    PrefillProgress,
    PromptMessage,
    Ready,
    Refused,
    Sampling,
    SetBudget,
    SetPrecision,
    Spill,
    Status,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    Warm,
    WarmCache,
)
from kvchat.engine_process import client, server
from kvchat.engine_process.client import LOG_TAIL_LINES, LinkedEngine, log_tail
from kvchat.engine_process.server import BATCH_S, EngineOptions, batched
from tests.support.samples import TOKENIZER, finished, piece

PATIENCE_S = 120.0
"""Timeout of every wait."""
DISK = 1_000_000_000
OPENING = 17
"""Tokens of the template before the first question: a prefix that all conversations share."""
LONG = 700
"""Tokens of an answer that is interrupted."""

numbers = count(1)


class PulledEngine(LinkedEngine):
    """An engine in a child process whose turns are read one event after the other."""

    def __init__(self, options: EngineOptions, on_status: Callable[[Status], None]) -> None:
        self._turns: dict[str, Queue[TurnEvent]] = {}

        def sort(event: TurnEvent | Status) -> None:
            if isinstance(event, TurnEvent):
                self._turns[event.turn].put(event)
            else:
                on_status(event)

        super().__init__(options, sort)

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Asks when the first event is wanted; ends after the last event of the turn."""
        events = self._turns[request.turn] = Queue()
        self.submit(request)
        event: TurnEvent | None = None
        while not isinstance(event, TurnFinished | TurnFailed):
            event = events.get()
            yield event


@dataclass
class Linked:
    """An engine in a child process, and what it reported."""

    engine: PulledEngine
    statuses: "Queue[Status]"
    log_file: Path
    kv_folder: Path
    reports: list[Status] = field(default_factory=list)
    """Statuses until it was ready."""

    def status(self) -> Status:
        """The next report."""
        return self.statuses.get(timeout=PATIENCE_S)

    def until_ready(self) -> list[Status]:
        """Waits until the model is loaded; what was reported meanwhile, the caches that there are at last."""
        reports = [self.status()]
        while isinstance(reports[-1], Loading):
            reports.append(self.status())
        assert isinstance(reports[-1], Ready), reports
        pool = self.status()
        assert isinstance(pool, PoolState), pool
        return [*reports, pool]

    def done(self, act: CacheCommand) -> tuple[list[Status], PoolState]:
        """Does something to the caches; what was reported of it, and the caches that there are then."""
        self.engine.command(act)
        reports = [self.status()]
        while not isinstance(reports[-1], PoolState):
            reports.append(self.status())
        *before, pool = reports
        assert isinstance(pool, PoolState)
        return before, pool

    def answer(self, request: TurnRequest) -> TurnFinished:
        """A whole turn."""
        return ended(list(self.engine.turn(request)))

    def saved(self, conversation: str) -> Chain:
        """What lies on disk of a conversation."""
        return DiskStore(self.kv_folder, DISK).chain(conversation)

    @property
    def child(self) -> psutil.Process:
        assert self.engine.pid
        return psutil.Process(self.engine.pid)


def linked(folder: Path, log_file: Path) -> Linked:
    statuses: Queue[Status] = Queue()
    kv_folder = log_file.parent / "kv"
    options = EngineOptions(
        folder, "tiny", log_file, precision="fp32", threads=1, kv_folder=kv_folder, kv_disk=DISK
    )
    return Linked(PulledEngine(options, statuses.put), statuses, log_file, kv_folder)


def cache_of(pool: PoolState, conversation: str) -> WarmCache | None:
    """The cache of a conversation, in memory or on disk."""
    return next((cache for cache in pool.caches if cache.conversation == conversation), None)


def hot(pool: PoolState) -> set[str]:
    """The conversations whose cache is in memory."""
    return {cache.conversation for cache in pool.caches if cache.hot}


@pytest.fixture(scope="module")
def running(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linked]:
    """A shared child: each test uses its own conversation."""
    started = linked(tiny_folder, tmp_path_factory.mktemp("log") / "engine.log")
    started.engine.start()
    started.reports = started.until_ready()
    yield started
    started.engine.close()


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path) -> Iterator[Linked]:
    """A child for one test, not started yet."""
    mine = linked(tiny_folder, tmp_path / "log" / "engine.log")
    yield mine
    mine.engine.close()


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until the condition is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def is_gone(process: psutil.Process) -> bool:
    """Whether it ended; an orphan may still be a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ask(
    *texts: str,
    talk: str = "",
    tokens: int = 12,
    mode: CacheMode = CacheMode.ON,
    before: TurnRequest | None = None,
) -> TurnRequest:
    """A turn with these questions and answers."""
    messages = (before.messages if before else ()) + tuple(PromptMessage("user", text) for text in texts)
    number = next(numbers)
    talk = talk or (before.conversation if before else f"talk-{number}")
    return TurnRequest(f"turn {number}", talk, messages, mode, Sampling(max_tokens=tokens))


def ask_for_much(mode: CacheMode = CacheMode.OFF) -> TurnRequest:
    """A turn whose answer takes a while."""
    return ask("Tell me about the sea.", tokens=LONG, mode=mode)


def following(request: TurnRequest, answer: TurnFinished, text: str) -> TurnRequest:
    """The next turn of the conversation."""
    said = PromptMessage("assistant", answer.text, answer.token_ids, answer.tokenizer)
    return ask(text, before=replace(request, messages=(*request.messages, said)))


def ended(events: Sequence[TurnEvent]) -> TurnFinished:
    assert isinstance(events[-1], TurnFinished), events[-1]
    return events[-1]


def run_until_tokens(turn: Iterator[TurnEvent]) -> list[TurnEvent]:
    """The events up to the first piece of the answer."""
    events = [next(turn)]
    while not isinstance(events[-1], Tokens):
        events.append(next(turn))
    return events


# turns


def test_start_reports_loading_then_ready_with_model_facts(running: Linked) -> None:
    *loading, ready, pool = running.reports
    assert loading == [Loading("importing torch"), Loading("loading tiny")]
    assert isinstance(ready, Ready)
    facts = ready.model
    assert (facts.name, facts.path, facts.threads) == ("tiny", "eager fp32", 1)
    assert (facts.layers, facts.kv_heads, facts.head_dim, facts.context_limit) == (4, 2, 16, 1024)
    assert ready.rss_bytes > facts.weights_bytes > 0
    assert isinstance(pool, PoolState)
    assert (pool.caches, pool.used_bytes, pool.disk_bytes, pool.disk_cap_bytes) == ((), 0, 0, DISK)
    assert pool.budget_bytes > 0


def test_turn_events_arrive_in_order(running: Linked) -> None:
    request = ask("The drive over the pass takes three hours. " * 60, tokens=30)
    started, *progress, last = running.engine.turn(request)
    assert isinstance(started, TurnStarted)
    assert isinstance(last, TurnFinished)
    reads = [event for event in progress if isinstance(event, PrefillProgress)]
    pieces = [event for event in progress if isinstance(event, Tokens)]
    assert progress == [*reads, *pieces]
    assert [event.done for event in reads] == [512, started.prefilled_tokens]
    assert "".join(event.text for event in pieces) == last.text != ""
    assert [token for event in pieces for token in event.token_ids] == list(last.token_ids)
    assert sum(len(event.step_s) for event in pieces) == last.stats.generated_tokens == 30
    assert {event.turn for event in (started, *progress, last)} == {request.turn}


def test_later_turns_reuse_the_cache(running: Linked) -> None:
    request = ask("Bread is made from flour, water and salt.")  # nobody else asks it, and could lend it
    held, reused = {0, OPENING}, []
    for question in ("How long is the drive?", "And the train?", "Why?"):
        answer = ended(list(running.engine.turn(request)))
        assert answer.stats.reused_tokens in held
        held = {answer.stats.kv_tokens}
        reused.append(answer.stats.reused_tokens)
        request = following(request, answer, question)
    assert reused == sorted(set(reused))
    assert request.conversation in hot(answer.pool)


def test_forget_frees_one_conversation(running: Linked) -> None:
    forgotten, kept = ask("Mix the flour and the water."), ask("The train takes two hours.")
    first, second = (ended(list(running.engine.turn(request))) for request in (forgotten, kept))
    running.engine.forget(forgotten.conversation)
    running.engine.forget("never-heard-of")
    again = ended(list(running.engine.turn(following(kept, second, "More"))))
    assert again.stats.reused_tokens == second.stats.kv_tokens
    assert kept.conversation in hot(again.pool)
    assert cache_of(again.pool, forgotten.conversation) is None
    assert not running.saved(forgotten.conversation).segments
    cold = ended(list(running.engine.turn(following(forgotten, first, "More"))))
    assert cold.stats.reused_tokens in {0, OPENING}
    assert cold.stats.reuse_note == "not read since the engine started"


def test_a_failed_forget_is_reported_and_the_engine_goes_on(running: Linked) -> None:
    running.engine.forget("../elsewhere")
    while not isinstance(status := running.status(), Refused):
        pass  # what earlier acts reported
    assert status.reason == "'../elsewhere' can't be the name of a folder for a cache."
    assert running.answer(ask("Still there?")).text


def test_stop_ends_the_turn_and_keeps_the_partial_answer(running: Linked) -> None:
    turn = running.engine.turn(request := ask_for_much())
    events = run_until_tokens(turn)
    running.engine.stop(request.turn)
    events += turn
    answer = ended(events)
    assert answer.stats.finish_reason == "cancelled"
    assert 0 < len(answer.token_ids) < LONG
    assert answer.text == "".join(event.text for event in events if isinstance(event, Tokens))


def test_stop_of_another_turn_has_no_effect(running: Linked) -> None:
    turn = running.engine.turn(ask("Which pass is open?", tokens=40))
    events = run_until_tokens(turn)
    running.engine.stop("another turn")
    events += turn
    assert ended(events).stats.finish_reason == "length"
    assert len(ended(events).token_ids) == 40


def test_the_child_ignores_signals_of_the_terminal(running: Linked) -> None:
    turn = running.engine.turn(ask("Which pass is open?", tokens=40))
    events = run_until_tokens(turn)
    running.child.send_signal(signal.SIGINT)
    assert ended([*events, *turn]).stats.finish_reason == "length"
    assert ended(list(running.engine.turn(ask("Still there?")))).text


def test_overlapping_turns_get_their_own_events(running: Linked) -> None:
    first, second = ask_for_much(), ask("Which pass is open?")
    turn = running.engine.turn(first)
    run_until_tokens(turn)
    running.engine.stop(first.turn)
    events = list(running.engine.turn(second))
    assert isinstance(events[0], TurnStarted)
    assert len(ended(events).token_ids) == 12
    assert {event.turn for event in events} == {second.turn}
    assert ended(list(turn)).stats.finish_reason == "cancelled"


def test_abandoning_a_turn_does_not_affect_the_next(running: Linked) -> None:
    left = ask("Which pass is open?", tokens=40)
    turn = running.engine.turn(left)
    next(turn)
    turn.close()  # type: ignore[attr-defined]
    answer = ended(list(running.engine.turn(ask("Still there?"))))
    assert answer.text
    assert left.conversation in hot(answer.pool)


def test_an_impossible_turn_fails_with_a_reason(running: Linked) -> None:
    (event,) = running.engine.turn(ask("too long " * 1100))
    assert isinstance(event, TurnFailed)
    assert "the context holds 1,024" in event.reason
    assert running.engine.pid
    assert ended(list(running.engine.turn(ask("Shorter")))).text


def test_the_child_imports_neither_screen_nor_store(running: Linked) -> None:
    report = running.log_file.parent / f"report-{running.engine.pid}.txt"
    running.child.send_signal(signal.SIGUSR1)
    eventually(report.exists)
    packages = set(report.read_text().splitlines()[0].split())
    assert "torch" in packages
    assert not packages & {"textual", "sqlite_utils"}


# commands


def test_estimate_cost_matches_the_turn(running: Linked) -> None:
    request = ask("Which pass is open?")
    first = running.answer(request)
    following_request = following(request, first, "How long is the drive?")
    (quote,), _ = running.done(EstimateCost("the key", following_request))
    assert isinstance(quote, CostEstimate)
    answer = running.answer(following_request).stats
    assert (quote.key, quote.refusal, quote.miss) == ("the key", "", None)
    assert (quote.prompt_tokens, quote.reused_tokens, quote.prefilled_tokens) == (
        answer.prompt_tokens,
        answer.reused_tokens,
        answer.prefilled_tokens,
    )
    (too_long,), _ = running.done(EstimateCost("another", ask("too long " * 1100)))
    assert isinstance(too_long, CostEstimate)
    assert (too_long.key, "the context holds 1,024" in too_long.refusal) == ("another", True)


def test_set_precision_converts_the_cache_and_reports_agreement(running: Linked) -> None:
    request = ask("The drive over the pass takes three hours. " * 30)
    first = running.answer(request)
    before = cache_of(first.pool, request.conversation)
    assert before
    (converted,), pool = running.done(SetPrecision(request.conversation, KVPrecision.INT8))
    assert isinstance(converted, Converted)
    after = cache_of(pool, request.conversation)
    assert after
    assert (converted.conversation, converted.kv_dtype, after.kv_dtype) == (
        request.conversation,
        "int8",
        "int8",
    )
    assert (converted.bytes_before, converted.bytes_after) == (before.bytes, after.bytes)
    assert converted.bytes_after < converted.bytes_before
    assert 0 < converted.agreeing_tokens <= converted.compared_tokens
    assert CacheEventKind.CONVERT in {event.kind for event in pool.events}
    again = replace(following(request, first, "Why?"), kv=KVPrecision.INT8)
    stats = running.answer(again).stats
    assert (stats.reused_tokens, stats.kv_dtype) == (first.stats.kv_tokens, "int8")


def test_spill_and_warm_move_a_cache_to_disk_and_back(running: Linked) -> None:
    request = ask("Which pass is open?")
    first = running.answer(request)
    talk = request.conversation
    reports, cold = running.done(Spill(talk))
    assert reports == []
    spilled = cache_of(cold, talk)
    assert spilled
    assert (spilled.hot, spilled.disk_bytes > 0) == (False, True)
    assert len(running.saved(talk).rows) == first.stats.kv_tokens
    reports, warm = running.done(Warm(talk))
    assert (reports, talk in hot(warm)) == ([], True)
    assert [event.kind for event in warm.events if event.conversation == talk] == [CacheEventKind.RESTORE]
    answer = running.answer(following(request, first, "Why?")).stats
    assert (answer.reused_tokens, answer.restored_tokens) == (first.stats.kv_tokens, 0)


def test_an_impossible_command_is_refused_and_changes_nothing(running: Linked) -> None:
    request = ask("Which pass is open?")
    first = running.answer(request)
    running.done(Spill(request.conversation))
    (refused,), pool = running.done(Warm(request.conversation, KVPrecision.INT8))
    assert refused == Refused(
        "The saved cache can't be used: KV precision changed: fp32 → int8. "
        "The next turn reads the conversation."
    )
    assert request.conversation not in hot(pool)
    answer = running.answer(following(request, first, "Why?")).stats
    assert answer.restored_tokens == answer.reused_tokens == first.stats.kv_tokens


def test_a_fork_reuses_the_parents_cache(running: Linked) -> None:
    request = ask("Which pass is open?")
    first = running.answer(request)
    child = f"fork-of-{request.conversation}"
    reports, pool = running.done(Fork(request.conversation, child))
    assert (reports, {request.conversation, child} <= hot(pool)) == ([], True)
    answer = running.answer(replace(following(request, first, "Why?"), conversation=child)).stats
    assert (answer.reused_tokens, answer.reuse_note) == (first.stats.kv_tokens, "")


def test_pin_and_drop_are_in_the_next_report(running: Linked) -> None:
    request = ask("Which pass is open?")
    running.answer(request)
    pinned = cache_of(running.done(Pin(request.conversation, True))[1], request.conversation)
    loose = cache_of(running.done(Pin(request.conversation, False))[1], request.conversation)
    assert pinned
    assert loose
    assert (pinned.pinned, loose.pinned) == (True, False)
    _, pool = running.done(Drop(request.conversation))
    assert cache_of(pool, request.conversation) is None
    assert not running.saved(request.conversation).segments


def test_a_smaller_budget_spills_caches(running: Linked) -> None:
    first, second = ask("Which pass is open?"), ask("Tell me about the sea.")
    answers = [running.answer(request) for request in (first, second)]
    pool = answers[1].pool
    for talk in hot(pool) - {first.conversation, second.conversation}:
        pool = running.done(Drop(talk))[1]
    assert hot(pool) == {first.conversation, second.conversation}
    before, less = pool.budget_bytes, pool.used_bytes - 1
    try:
        _, pool = running.done(SetBudget(less))
        assert (hot(pool), pool.budget_bytes) == ({second.conversation}, less)
        again = running.answer(following(first, answers[0], "Why?"))
        assert again.stats.restored_tokens == answers[0].stats.kv_tokens
        assert hot(again.pool) == {first.conversation}
    finally:
        running.done(SetBudget(before))


def test_a_command_waits_for_the_current_turn(running: Linked) -> None:
    request = ask("Which pass is open?", tokens=40)
    turn = running.engine.turn(request)
    events = run_until_tokens(turn)
    running.engine.command(Drop(request.conversation))
    assert len(ended([*events, *turn]).token_ids) == 40
    pool = running.status()
    assert isinstance(pool, PoolState)
    assert cache_of(pool, request.conversation) is None


# saved caches


DELAYS_S = (0, 0.001)
"""Delay between answer and kill; with the first one a file is partly written."""


def test_a_child_killed_during_a_save_leaves_a_valid_or_refused_cache(own: Linked, running: Linked) -> None:
    own.engine.start()
    own.until_ready()
    request = ask("The drive over the pass takes three hours. " * 20, tokens=4)
    for kill, delay in enumerate(DELAYS_S):
        answer = own.answer(request)
        assert answer.token_ids == running.answer(request).token_ids
        time.sleep(delay)
        own.child.kill()
        assert isinstance(own.status(), Died)
        chain = own.saved(request.conversation)  # whole segments, or none
        assert len(chain.rows) <= answer.stats.kv_tokens
        own.engine.start()
        own.until_ready()
        request = following(request, answer, f"And {kill}? " + "The train takes two hours. " * 10)
        (quote,), _ = own.done(EstimateCost("after a kill", request))
        assert isinstance(quote, CostEstimate)
        assert quote.reused_tokens == len(chain.rows)
        if quote.reused_tokens < answer.stats.kv_tokens:
            assert quote.miss
            assert quote.miss.cause
    last = own.answer(request)
    assert last.token_ids == running.answer(request).token_ids
    own.engine.close()
    assert len(own.saved(request.conversation).rows) == last.stats.kv_tokens
    assert not list(own.kv_folder.glob("*/*.tmp"))


# death of the child


def test_a_killed_child_is_reported_and_its_successor_restores_from_disk(own: Linked) -> None:
    own.engine.start()
    own.until_ready()
    kept = ask("Which pass is open?")
    first = own.answer(kept)
    eventually(lambda: len(own.saved(kept.conversation).rows) == first.stats.kv_tokens)
    broken = TurnRequest("broken", "c", (PromptMessage("user", cast("str", 5)),), CacheMode.ON, Sampling())
    (failed,) = own.engine.turn(broken)
    assert isinstance(failed, TurnFailed)
    assert "messages[0].text must be text, not 5" in failed.reason
    with own.log_file.open("a") as log:  # as a library in the child prints
        log.write("printed by a library\n")
    turn = own.engine.turn(request := ask_for_much())
    events = run_until_tokens(turn)
    own.child.kill()
    events += turn
    reason = "The engine was killed (signal 9: often the system ran out of memory)."
    assert events[-1] == TurnFailed(request.turn, reason)
    died = own.status()
    assert isinstance(died, Died)
    assert died.reason == reason
    assert died.log_tail == log_tail(own.log_file)
    assert died.log_tail[-1] == "printed by a library"
    assert stat.S_IMODE(own.log_file.stat().st_mode) == 0o600
    assert list(own.engine.turn(ask("Anyone?", talk="c")))[-1].__class__ is TurnFailed

    before = own.engine.pid
    own.engine.start()
    pool = own.until_ready()[-1]
    assert own.engine.pid != before
    assert isinstance(pool, PoolState)
    assert [(cache.conversation, cache.hot) for cache in pool.caches] == [(kept.conversation, False)]
    again = own.answer(following(kept, first, "How long is the drive?"))
    stats = again.stats
    assert stats.restored_tokens == stats.reused_tokens == first.stats.kv_tokens
    assert (stats.prefilled_tokens, stats.reuse_note) == (stats.prompt_tokens - stats.restored_tokens, "")
    assert (len(again.token_ids), hot(again.pool)) == (12, {kept.conversation})


def test_a_failed_load_is_one_sentence_and_ends_the_child(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "log_tail", lambda _: ("what a library said before",))
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    broken = linked(folder, tmp_path / "engine.log")
    broken.engine.start()
    pid = broken.engine.pid
    while isinstance(died := broken.status(), Loading):
        pass
    assert isinstance(died, Died)
    assert died.reason.startswith(f"tiny: the weights in {folder} can't be loaded: ")
    assert died.log_tail == ()
    request = ask("Which pass is open?")
    assert list(broken.engine.turn(request)) == [TurnFailed(request.turn, "The engine is not running.")]
    assert broken.statuses.empty()
    assert broken.engine.pid == pid
    broken.engine.close()


# closing


def in_background(work: Callable[[], object]) -> Thread:
    """Starts it in a thread of its own."""
    thread = Thread(target=work, daemon=True)
    thread.start()
    return thread


def ends(thread: Thread) -> bool:
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def test_close_kills_a_hanging_child_and_fails_its_turns(
    own: Linked,
) -> None:
    request, events = ask_for_much(), list[TurnEvent]()
    own.engine.start()
    assert own.status() == Loading("importing torch")
    follower = in_background(lambda: events.extend(own.engine.turn(request)))
    child = own.child
    child.suspend()
    assert ends(in_background(own.engine.close))
    assert is_gone(child)
    assert ends(follower)
    assert [type(event) for event in events] == [TurnFailed]
    assert own.statuses.empty()


def test_close_ends_the_current_turn_and_saves_caches(own: Linked) -> None:
    """Both turns are requested before the child is started."""
    private = replace(ask("Which pass is open?"), persist=False)
    request, events = ask_for_much(CacheMode.ON), Queue[TurnEvent]()

    def follow(turn: Iterator[TurnEvent]) -> None:
        for event in turn:
            events.put(event)

    unsaved = in_background(lambda: list(own.engine.turn(private)))
    eventually(lambda: private.turn in own.engine._waiting)  # it is asked first
    follower = in_background(lambda: follow(own.engine.turn(request)))
    own.engine.start()
    seen = [events.get(timeout=PATIENCE_S)]
    while not any(isinstance(event, Tokens) for event in seen):
        seen.append(events.get(timeout=PATIENCE_S))
    assert ends(unsaved)
    assert not own.saved(request.conversation).segments
    child = own.child
    own.engine.close()
    assert is_gone(child)
    assert ends(follower)
    seen += events.queue
    assert isinstance(seen[-1], TurnFailed | TurnFinished)
    assert not any(isinstance(status, Died) for status in list(own.statuses.queue))
    (started,) = (event for event in seen if isinstance(event, TurnStarted))
    read = [i for event in seen if isinstance(event, Tokens) for i in event.token_ids]
    saved = own.saved(request.conversation)
    assert started.prompt_tokens <= len(saved.rows) <= started.prompt_tokens + LONG
    common = min(len(saved.ids) - started.prompt_tokens, len(read))
    assert list(saved.ids[started.prompt_tokens :])[:common] == read[:common]
    assert [folder.name for folder in own.kv_folder.iterdir() if folder.is_dir()] == [request.conversation]


def test_caches_that_may_not_persist_stay_in_memory(running: Linked) -> None:
    request = replace(ask("Which pass is open?"), persist=False)
    first = running.answer(request)
    again = running.answer(replace(following(request, first, "Why?"), persist=False))
    assert again.stats.reused_tokens == first.stats.kv_tokens
    running.done(Spill(request.conversation))
    assert not running.saved(request.conversation).segments


def test_close_before_start(own: Linked) -> None:
    own.engine.close()
    assert own.statuses.empty()


PARENT = """
import sys
from pathlib import Path
from kvchat.contract import CacheMode, PromptMessage, Ready, Sampling, Tokens, TurnRequest
from kvchat.engine_process.client import LinkedEngine
from kvchat.engine_process.server import EngineOptions

folder, log, when = sys.argv[1:]

def on_event(event):
    if when in type(event).__name__:
        print(engine.pid, flush=True)

engine = LinkedEngine(EngineOptions(Path(folder), "tiny", Path(log), "fp32", 1), on_event)
engine.start()
if when == "Ready":
    sys.stdin.read()
message = PromptMessage("user", "Tell me about the sea.")
engine.submit(TurnRequest("t", "c", (message,), CacheMode.OFF, Sampling(max_tokens=900)))
sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["Ready", "Tokens"])
def test_the_child_ends_after_its_parent_is_killed(tiny_folder: Path, tmp_path: Path, when: str) -> None:
    command = [sys.executable, "-c", PARENT, str(tiny_folder), str(tmp_path / "engine.log"), when]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        eventually(lambda: is_gone(child))


# the log


def test_output_of_the_child_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "engine.log"
    script = (
        "import os, sys; from pathlib import Path\n"
        "from kvchat.engine_process.server import _redirect_output\n"
        "_redirect_output(Path(sys.argv[1]))\n"
        "print('printed'); print('to stderr', file=sys.stderr); os.system('echo from a library'); os.abort()"
    )
    done = subprocess.run([sys.executable, "-c", script, log], capture_output=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", -signal.SIGABRT)
    assert log.read_text().splitlines() == ["printed", "to stderr", "from a library"]
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700


def test_log_tail_has_the_last_lines_that_are_not_blank(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    assert log_tail(log) == ()
    log.write_bytes(b"\n".join(b"line %d\n  " % i for i in range(20)) + b"\n\xff\n")
    assert log_tail(log) == ("line 15", "line 16", "line 17", "line 18", "line 19", "\ufffd")
    assert len(log_tail(log)) == LOG_TAIL_LINES


# batches


@dataclass
class Clock:
    """A fake `time` module for the server; the events advance it."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


def batches(timed: Sequence[tuple[float, TurnEvent]]) -> list[tuple[float, TurnEvent]]:
    """The events of `batched` for events with delays in seconds, each with the time it passed."""
    clock = Clock()

    def arriving() -> Iterator[TurnEvent]:
        for seconds, event in timed:
            clock.now += seconds
            yield event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "time", clock)
        return [(clock.now, event) for event in batched(arriving())]


def test_the_first_tokens_pass_immediately_and_later_ones_in_batches() -> None:
    step = BATCH_S / 4
    passed = batches(
        [(step, piece("t", str(i), i)) for i in range(10)] + [(step, finished("t", "0123456789"))]
    )
    assert [event.text for _, event in passed if isinstance(event, Tokens)] == ["0", "1234", "5678", "9"]
    assert [round(now / step) for now, _ in passed] == [1, 5, 9, 11, 11]
    assert isinstance(passed[-1][1], TurnFinished)


def test_slow_tokens_are_not_batched() -> None:
    slow = [(BATCH_S, piece("t", str(i), i)) for i in range(3)]
    assert [event for _, event in batches(slow)] == [event for _, event in slow]


def test_a_batch_joins_tokens_and_has_the_latest_sizes() -> None:
    first, second, third = (
        Tokens("t", text, (i,), (i / 10,), TOKENIZER, kv_tokens=i, kv_bytes=10 * i)
        for i, text in enumerate(("Which ", "pa", "ss"), start=1)
    )
    passed = [event for _, event in batches([(0, first), (0.01, second), (0.01, third)])]
    assert passed == [first, Tokens("t", "pass", (2, 3), (0.2, 0.3), TOKENIZER, kv_tokens=3, kv_bytes=30)]


def test_pending_tokens_precede_other_events() -> None:
    a, b, c = (piece("t", text, 1) for text in "abc")
    progress = PrefillProgress("t", 1, 2)
    failed = TurnFailed("t", "No memory left.")
    passed = [event for _, event in batches([(0, a), (0.01, b), (0, progress), (0, c), (0, failed)])]
    assert passed == [a, b, progress, c, failed]


events = st.one_of(
    st.builds(piece, st.just("t"), st.text(max_size=3), st.integers(0, 9)),
    st.builds(PrefillProgress, st.just("t"), st.integers(0, 9), st.just(9)),
)


@given(st.lists(st.tuples(st.floats(0, 2 * BATCH_S), events)))
def test_batching_preserves_tokens_and_order(timed: list[tuple[float, TurnEvent]]) -> None:
    def unbatched(passed: Sequence[tuple[float, TurnEvent]]) -> list[object]:
        """Texts between the other events, and these."""
        flat: list[object] = [("", ())]
        for _, event in passed:
            if not isinstance(event, Tokens):
                flat += [event, ("", ())]
            else:
                text, ids = cast("tuple[str, tuple[int, ...]]", flat[-1])
                flat[-1] = (text + event.text, ids + event.token_ids)
        return flat

    passed = batches(timed)
    assert unbatched(passed) == unbatched(timed)
    assert len(passed) <= len(timed)
