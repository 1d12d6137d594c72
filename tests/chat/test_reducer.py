"""Sequences of events, and the state that front ends draw after them."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from kvchat.chat.active_turn import NotSent
from kvchat.chat.reducer import (
    KEPT_STEPS,
    Abandoned,
    Asked,
    Configured,
    EngineReplaced,
    Event,
    Forgotten,
    ModelChosen,
    NotAnswered,
    Opened,
    reduce,
)
from kvchat.chat.state import ENOUGH_TOKENS, ChatState, TurnFigures, figures_of, largest_prefill
from kvchat.contract import (
    CacheMode,
    Converted,
    Died,
    Evicted,
    EvictionPolicy,
    FinishReason,
    Loading,
    Miss,
    PoolState,
    PrefillProgress,
    PromptMessage,
    Ready,
    Sampling,
    Tokens,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    TurnStats,
    WarmCache,
)
from tests.support.scripted_engine import FACTS, RSS, stats_of

POOL = PoolState((), 0, 2_000_000_000, 0, 0)
HERE, OTHER = Opened("here"), Opened("other")
ASKED = Asked("turn", "here")
STARTED = TurnStarted("turn", 30, 20, 10, "system prompt changed", restored_tokens=15)
MISS = Miss("system prompt edited", 1100, 2.0)


def after(*events: Event, state: ChatState | None = None, step_s: float = 1.0) -> ChatState:
    """The state after these events, a second between each of them; the conversation `here` is open."""
    state = state or reduce(ChatState(), HERE)
    for second, event in enumerate(events, start=1):
        state = reduce(state, event, second * step_s)
    return state


def stats(
    mode: CacheMode = CacheMode.ON, *, reused: int = 0, prompt: int = 104, written: int = 10
) -> TurnStats:
    """Figures of a turn with so many tokens."""
    message = PromptMessage("user", "word " * (prompt - 4))
    request = TurnRequest("turn", "here", (message,), mode, Sampling())
    return stats_of(request, reused, written, FinishReason.STOP)


def tokens(count: int, *, said: str = "x", seconds: float = 0.02) -> Tokens:
    return Tokens("turn", said, (1,) * count, (seconds,) * count, "scripted", count, count * 10)


def finished(measured: TurnStats, pool: PoolState = POOL) -> TurnFinished:
    return TurnFinished("turn", "text", (1,), "scripted", measured, pool)


def answered(*given: TurnStats) -> list[Event]:
    """So many turns from their beginning to their end."""
    return [event for each in given for event in (ASKED, finished(each))]


# --- a turn ----------------------------------------------------------------------------------------------


def test_a_turn_is_counted_while_it_goes_on() -> None:
    begun: list[Event] = [ASKED, STARTED, tokens(1, said="", seconds=9.0)]
    assert after(*begun).turn.ttft_s is None
    state = after(*begun, tokens(2))
    turn = state.turn
    assert (turn.reused, turn.read, turn.written, turn.context) == (20, 10, 3, 33)
    assert turn.reuse_note == "system prompt changed"
    assert turn.ttft_s == 3.0
    # the first token's step is the prefill: 9 s would be no decode step
    assert state.step_ms == (20.0, 20.0)
    assert turn.decode_tok_s == pytest.approx(50.0)
    assert state.active
    assert (state.active.text, state.active.written) == ("x", 3)


def test_every_eviction_of_a_turn_is_counted_and_the_next_turn_begins_at_nothing() -> None:
    evicted: list[Event] = [ASKED, Evicted("turn", 500, "", 2), Evicted("turn", 12, "", 4)]
    state = after(*evicted)
    assert state.turn.evicted == 512
    assert state.active
    assert [event.evicted_messages for event in state.active.evictions] == [2, 4]
    assert after(*evicted, ASKED).turn.evicted == 0


def test_what_was_restored_is_known_before_the_first_token() -> None:
    assert after(ASKED, STARTED).turn.restored == 15


def test_measured_figures_replace_counted_ones() -> None:
    measured = stats(reused=90)
    state = after(ASKED, tokens(3), finished(measured))
    assert state.turn == figures_of(measured)
    assert state.rss_bytes == measured.rss_bytes
    assert state.turns == (measured,)
    assert state.active is None


def test_the_last_turn_of_each_mode_is_remembered() -> None:
    first, second, off = stats(written=10), stats(written=20), stats(CacheMode.OFF)
    assert after(*answered(first, off, second)).by_mode == {"on": second, "off": off}


def test_only_the_latest_steps_are_kept() -> None:
    assert len(after(ASKED, tokens(10 * KEPT_STEPS)).step_ms) == KEPT_STEPS


def test_a_new_turn_keeps_what_the_cache_holds_and_forgets_the_rest() -> None:
    state = after(*answered(stats(reused=90)), ASKED)
    assert state.turn == TurnFigures(kv_tokens=114, kv_bytes=114 * FACTS.kv_bytes_per_token)
    assert state.step_ms == ()


def test_a_short_prefill_says_nothing_and_a_long_one_how_much_is_left() -> None:
    assert after(ASKED, PrefillProgress("turn", 1_000_000_000, 1_000_000_001)).turn.reading == ""
    slow: list[Event] = [ASKED, PrefillProgress("turn", 1, 1_000_000_000_000)]
    assert after(*slow).turn.reading.startswith("reading 1 of 1,000,000,000,000, 999999999999 s left")
    assert after(*slow, tokens(1)).turn.reading == ""


def test_a_stopped_turn_ends_like_every_other_and_its_figures_count() -> None:
    measured = replace(stats(written=2), finish_reason=FinishReason.CANCELLED.value)
    state = after(ASKED, STARTED, tokens(2), finished(measured))
    assert state.active is None
    assert state.turns == (measured,)


def test_a_turn_that_fails_before_its_answer_leaves_the_figures_of_the_one_before() -> None:
    before = after(*answered(stats(reused=90)))
    missed = replace(STARTED, miss=MISS)
    state = after(ASKED, missed, TurnFailed("turn", "No room."), state=before)
    assert state.active is None
    assert (state.turn.reused, state.turn.read) == (90, 14)
    assert state.last_miss is None
    question = NotSent("here", "Why?")
    assert after(NotAnswered(question), state=state).not_sent is question
    assert after(NotAnswered(question), ASKED, state=state).not_sent is None


def test_a_turn_that_fails_in_mid_answer_keeps_what_was_counted() -> None:
    state = after(ASKED, STARTED, tokens(2), TurnFailed("turn", "No room."))
    assert state.active is None
    assert (state.turn.written, state.turns) == (2, ())


def test_events_of_another_turn_change_the_caches_and_nothing_else() -> None:
    pool = replace(POOL, caches=(WarmCache("here", 7, 70),), used_bytes=70)
    before = after(ASKED, STARTED)
    others: Iterable[Event] = (
        replace(STARTED, turn="race", reused_tokens=1),
        replace(tokens(5), turn="race"),
        Evicted("race", 5, "", 1),
        replace(finished(stats(), pool), turn="race"),
        TurnFailed("race", "No."),
    )
    state = after(*others, state=before)
    assert state == replace(before, pool=pool, turn=replace(before.turn, kv_tokens=7, kv_bytes=70))


def test_the_last_miss_is_that_of_the_open_conversation() -> None:
    missed: list[Event] = [ASKED, replace(STARTED, miss=MISS)]
    assert after(*missed).last_miss is MISS
    assert after(*missed, finished(stats())).last_miss is MISS
    assert after(*missed, OTHER).last_miss is None


# --- another conversation --------------------------------------------------------------------------------


def test_an_opened_conversation_shows_its_last_turn_and_what_is_warm() -> None:
    on, off = stats(reused=90), stats(CacheMode.OFF)
    pool = replace(POOL, caches=(WarmCache("id", 114, 5000),))
    state = after(pool, Opened("id", (off, on)), Configured(CacheMode.TURN, EvictionPolicy.SINKS))
    assert state.mode is CacheMode.TURN
    assert state.policy is EvictionPolicy.SINKS
    assert state.turn == replace(figures_of(on), kv_tokens=114, kv_bytes=5000)
    assert state.by_mode == {"off": off, "on": on}
    state = after(POOL, Opened("id", (off, on)), state=state)
    assert (state.turn.kv_tokens, state.turn.kv_bytes) == (0, 0)
    state = after(OTHER, state=state)
    assert state.turn == TurnFigures()
    assert state.by_mode == {}


def test_an_answer_that_is_come_back_to_counts_on_and_claims_no_ttft() -> None:
    state = after(ASKED, STARTED, OTHER, tokens(40, said="much "), HERE, tokens(2))
    assert state.turn.written == 42
    assert state.turn.reused == 20
    assert state.turn.ttft_s is None
    assert len(state.step_ms) == 2
    assert state.active
    assert state.active.text == "much x"


def test_a_turn_that_goes_on_elsewhere_changes_nothing_of_what_is_shown() -> None:
    away = after(ASKED, OTHER)
    evicted = Evicted("turn", 500, "", 2)
    state = after(STARTED, evicted, PrefillProgress("turn", 1, 9), tokens(3), state=away)
    assert (state.turn, state.step_ms, state.last_miss) == (away.turn, away.step_ms, away.last_miss)
    assert after(HERE, state=state).turn.evicted == 500
    measured = stats(prompt=1000)
    state = after(finished(measured), state=state)
    assert (state.turn, state.turns, state.active) == (away.turn, (), None)
    assert state.prefill_rate == measured.prefill_tok_s


def test_a_failure_elsewhere_and_a_conversation_that_is_gone_end_the_turn() -> None:
    away = after(ASKED, OTHER, tokens(3))
    assert after(TurnFailed("turn", "No."), state=away) == replace(away, active=None)
    assert after(Abandoned(), state=away) == replace(away, active=None)


# --- caches and the engine -------------------------------------------------------------------------------


def test_what_happens_to_a_cache_between_turns_changes_what_it_holds() -> None:
    pool = PoolState((WarmCache("other", 1, 1), WarmCache("here", 57, 5700)), 5701, 10_000, 0, 0)
    state = after(*answered(stats(reused=90)), pool)
    assert (state.turn.kv_tokens, state.turn.kv_bytes) == (57, 5700)
    assert state.turn.reused == 90
    assert state.others_bytes == 1
    assert set(state.caches) == {"other", "here"}
    assert set(after(Forgotten("here"), state=state).caches) == {"other"}
    state = after(POOL, state=state)
    assert (state.turn.kv_tokens, state.turn.kv_bytes) == (0, 0)


def test_the_rate_of_reading_comes_from_the_largest_prompt_that_was_long_enough() -> None:
    def rate(*given: tuple[int, float]) -> float:
        turns = [replace(stats(prompt=prompt), prefill_tok_s=measured) for prompt, measured in given]
        state = after(*answered(*turns))
        largest = largest_prefill(reversed(turns))
        assert state.prefill_rate == (largest.prefill_tok_s if largest else 0.0)
        return state.prefill_rate

    short, long = (ENOUGH_TOKENS - 1, 1.0), (1000, 2.0)
    assert rate(short) == 0
    assert rate(short, long) == 2.0
    assert rate(short, long, (ENOUGH_TOKENS, 3.0)) == 2.0
    assert rate(short, long, (2000, 4.0)) == 4.0
    assert rate(long, (1000, 5.0)) == 5.0


def test_the_rate_stays_when_another_conversation_is_opened() -> None:
    state = after(*answered(replace(stats(prompt=1000), prefill_tok_s=2.0)), OTHER)
    assert state.prefill_rate == 2.0


def test_an_engine_that_comes_dies_and_is_replaced() -> None:
    state = after(Loading("importing torch\x1b"))
    assert (state.status, state.ready, state.model) == ("importing torch …", False, None)
    pool = replace(POOL, caches=(WarmCache("here", 9, 9),), used_bytes=9)
    state = after(Ready(FACTS, RSS), pool, state=state)
    assert (state.status, state.ready, state.model, state.rss_bytes) == ("ready", True, FACTS, RSS)
    state = replace(state, turn=TurnFigures(read=9, kv_tokens=9, kv_bytes=9))
    again = after(Died("killed"), state=state)
    assert (again.status, again.ready, again.gone) == ("starting again …", False, False)
    assert (again.turn.kv_tokens, again.turn.kv_bytes, again.rss_bytes, again.turn.read) == (0, 0, 0, 9)
    assert again.pool is None
    assert again.caches == {}
    assert again.model is FACTS
    gone = after(Died("killed", for_good=True), state=state)
    assert (gone.status, gone.ready, gone.gone) == ("the engine is not running", False, True)
    other = after(ModelChosen("other", "Other"), EngineReplaced(), state=gone)
    assert (other.model_name, other.model_title) == ("other", "Other")
    assert (other.status, other.ready, other.gone) == ("starting …", False, False)


def test_a_death_in_mid_answer_ends_the_turn_with_its_failure() -> None:
    state = after(Ready(FACTS, RSS), ASKED, STARTED, tokens(2), TurnFailed("turn", "killed"), Died("killed"))
    assert (state.active, state.pool, state.turn.written) == (None, None, 2)


def test_what_came_of_a_conversion_is_kept() -> None:
    done = Converted("here", "int8", 10, 5, 64, 63)
    assert after(done).converted is done


def test_reducing_changes_no_state_in_place() -> None:
    before = after(*answered(stats()))
    copy = replace(before)
    after(ASKED, STARTED, tokens(3), finished(stats()), OTHER, Died("x"), state=before)
    assert before == copy
