"""Events become the state that front ends draw: (state, event) -> state, and nothing else happens."""

from dataclasses import dataclass, replace

from kvchat.chat.active_turn import NotSent
from kvchat.chat.state import (
    ChatState,
    TurnFigures,
    TurnUnderWay,
    figures_of,
    largest_prefill,
)
from kvchat.contract import (
    CacheMode,
    Converted,
    Died,
    Evicted,
    EvictionPolicy,
    Loading,
    PoolState,
    PrefillProgress,
    Ready,
    Status,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    TurnStats,
)
from kvchat.text import one_line

KEPT_STEPS = 64
"""Tokens whose milliseconds the sparkline remembers."""
WORTH_TELLING_S = 0.5
"""The progress of a prefill that ends sooner is not shown."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Another conversation is open, or another branch of it; with the figures of its turns, oldest first."""

    conversation: str
    turns: tuple[TurnStats, ...] = ()


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A conversation's cache is freed; the engine says so later."""

    conversation: str


@dataclass(frozen=True, slots=True)
class Configured:
    """The open conversation's settings, as far as they are drawn."""

    mode: CacheMode
    policy: EvictionPolicy


@dataclass(frozen=True, slots=True)
class Asked:
    """A turn begins; `text` is what its answer says already, where it goes on with one."""

    turn: str
    conversation: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The turn under way ends without an event: its conversation is gone."""


@dataclass(frozen=True, slots=True)
class NotAnswered:
    """The question of a turn that failed before its answer began."""

    question: NotSent


@dataclass(frozen=True, slots=True)
class ModelChosen:
    """Another model answers from now on."""

    name: str
    title: str


@dataclass(frozen=True, slots=True)
class EngineReplaced:
    """The engine's process is ended and another one starts: nothing is cached in memory any more."""

    status: str = "starting …"


Change = Opened | Forgotten | Configured | Asked | Abandoned | NotAnswered | ModelChosen | EngineReplaced
"""What the controller itself does; everything else comes from the engine."""
Event = TurnEvent | Status | Change


def reduce(state: ChatState, event: Event, now: float = 0.0) -> ChatState:
    """The state after an event.

    Args:
        state: before it.
        event: of the engine or of the controller; those of other turns than the one under way change the
            caches and nothing else.
        now: seconds on a clock that only goes forward; differences are shown as TTFT and as remaining time.
    """
    match event:
        case Loading():
            return replace(state, status=f"{one_line(event.stage)} …")
        case Ready():
            return replace(
                state,
                status="ready",
                ready=True,
                gone=False,
                model=event.model,
                rss_bytes=event.rss_bytes,
            )
        case PoolState():
            return _with_pool(state, event)
        case Died():
            status = "the engine is not running" if event.for_good else "starting again …"
            return replace(_without_engine(state, status), gone=event.for_good)
        case EngineReplaced():
            return _without_engine(state, event.status)
        case ModelChosen():
            return replace(state, model_name=event.name, model_title=event.title)
        case Configured():
            return replace(state, mode=event.mode, policy=event.policy)
        case Converted():
            return replace(state, converted=event)
        case Forgotten() if state.pool:
            left = tuple(cache for cache in state.pool.caches if cache.conversation != event.conversation)
            return replace(state, pool=replace(state.pool, caches=left))
        case Opened():
            return _opened(state, event)
        case Asked():
            return _asked(state, event, now)
        case Abandoned():
            return replace(state, active=None)
        case NotAnswered():
            return replace(state, not_sent=event.question)
        case TurnStarted() | PrefillProgress() | Tokens() | Evicted() | TurnFinished() | TurnFailed():
            return _in_turn(state, event, now)
        case _:
            return state


def _in_turn(state: ChatState, event: TurnEvent, now: float) -> ChatState:
    if isinstance(event, TurnFinished):
        state = _with_pool(state, event.pool)
    active = state.active
    if active is None or active.turn != event.turn:
        return state
    here = state.active_here is not None
    match event:
        case TurnStarted():
            state = replace(state, active=replace(active, started=event))
            return _started(state, event) if here else state
        case PrefillProgress():
            return _prefilled(state, event, now - active.asked_at) if here and active.asked_at else state
        case Evicted():
            state = replace(state, active=replace(active, evictions=(*active.evictions, event)))
            return _turn(state, evicted=state.turn.evicted + event.tokens) if here else state
        case Tokens():
            return _tokens(state, active, event, now)
        case TurnFinished():
            return _finished(state, event)
        case TurnFailed():
            state = replace(state, active=None)
            # nothing of this turn is in the conversation: the figures are those of the one before
            return state if active.written or not here else _last_turn(replace(state, last_miss=None))


def _without_engine(state: ChatState, status: str) -> ChatState:
    state = replace(state, status=status, ready=False, gone=False, rss_bytes=0, pool=None)
    return _turn(state, kv_tokens=0, kv_bytes=0)


def _with_pool(state: ChatState, pool: PoolState) -> ChatState:
    """The caches as they are now; that of the open conversation may have changed between turns."""
    state = replace(state, pool=pool)
    return state if state.turn.reading else _turn(state, **_cached(state))


def _cached(state: ChatState) -> dict[str, int]:
    cache = state.caches.get(state.conversation)
    return {"kv_tokens": cache.tokens if cache else 0, "kv_bytes": cache.bytes if cache else 0}


def _opened(state: ChatState, event: Opened) -> ChatState:
    state = replace(
        state,
        conversation=event.conversation,
        turns=event.turns,
        by_mode={stats.cache_mode: stats for stats in event.turns},
        last_miss=None,
        not_sent=None,
    )
    state = _last_turn(_with_rate(state))
    return _resumed(state, state.active) if state.active_here and state.active else state


def _resumed(state: ChatState, active: TurnUnderWay) -> ChatState:
    """The conversation of the turn under way is shown again; when its first text came is not known."""
    if active.written:
        active = replace(active, asked_at=0.0)
    state = replace(state, active=active)
    state = _turn(replace(state, turn=TurnFigures(written=active.written)), **_cached(state))
    if active.started:
        state = _started(state, active.started)
    return _turn(state, evicted=sum(evicted.tokens for evicted in active.evictions))


def _last_turn(state: ChatState) -> ChatState:
    """The figures of the last finished turn, and what is cached now."""
    figures = figures_of(state.turns[-1]) if state.turns else TurnFigures()
    return _turn(replace(state, turn=figures, step_ms=()), **_cached(state))


def _asked(state: ChatState, event: Asked, now: float) -> ChatState:
    active = TurnUnderWay(event.turn, event.conversation, now, event.text)
    held = TurnFigures(kv_tokens=state.turn.kv_tokens, kv_bytes=state.turn.kv_bytes)
    return replace(state, active=active, turn=held, step_ms=(), not_sent=None)


def _started(state: ChatState, event: TurnStarted) -> ChatState:
    return _turn(
        replace(state, last_miss=event.miss),
        reused=event.reused_tokens,
        read=event.prefilled_tokens,
        restored=event.restored_tokens,
        reuse_note=event.reuse_note,
    )


def _prefilled(state: ChatState, event: PrefillProgress, elapsed: float) -> ChatState:
    left = elapsed / event.done * (event.total - event.done)
    telling = f"reading {event.done:,} of {event.total:,}, {left:.0f} s left"
    return _turn(state, reading=telling if left >= WORTH_TELLING_S else "")


def _tokens(state: ChatState, active: TurnUnderWay, event: Tokens, now: float) -> ChatState:
    first = active.written == 0
    more = replace(active, text=active.text + event.text, written=active.written + len(event.token_ids))
    state = replace(state, active=more)
    if not state.active_here:
        return state
    ttft = state.turn.ttft_s
    if ttft is None and event.text and active.asked_at:
        ttft = now - active.asked_at
    # the first step of a turn is its prefill, not a decode step
    steps = [step * 1000 for step in event.step_s][1 if first else 0 :]
    step_ms = (*state.step_ms, *steps)[-KEPT_STEPS:]
    return _turn(
        replace(state, step_ms=step_ms),
        written=more.written,
        ttft_s=ttft,
        decode_tok_s=1000 * len(step_ms) / sum(step_ms) if step_ms else None,
        kv_tokens=event.kv_tokens,
        kv_bytes=event.kv_bytes,
        reading="",
    )


def _finished(state: ChatState, event: TurnFinished) -> ChatState:
    """The turn is over: measured figures replace what was counted on the way."""
    here = state.active_here is not None
    stats = event.stats
    state = replace(_with_rate(state, stats), active=None, rss_bytes=stats.rss_bytes)
    if not here:
        return state
    by_mode = {**state.by_mode, stats.cache_mode: stats}
    return replace(state, turn=figures_of(stats), by_mode=by_mode, turns=(*state.turns, stats))


def _with_rate(state: ChatState, *measured: TurnStats) -> ChatState:
    """Takes the open conversation's turns and others that were measured into account."""
    before = [state.largest_prefill] if state.largest_prefill else []
    # of two that are as large, the later one
    largest = largest_prefill((*measured, *reversed(state.turns), *before))
    return replace(state, largest_prefill=largest)


def _turn(state: ChatState, **changes: object) -> ChatState:
    return replace(state, turn=replace(state.turn, **changes))  # type: ignore[arg-type]
