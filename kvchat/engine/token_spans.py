"""What a turn does with the tokens of every message: reused, read, written, evicted, or never cached.

Counts ranges instead of single tokens, since every turn waits for it. Must not import tensors.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.prefix import common_prefix
from kvchat.contract import CacheMode, TokenSpan, TokenStatus, TurnRequest
from kvchat.engine.planner import TurnPlan
from kvchat.engine.turn import Turn

CountStored = Callable[[int, int], int]
"""How many tokens of a range of the history are stored."""


def spans_at_start(request: TurnRequest, plan: TurnPlan, kv: ConversationKV) -> tuple[TokenSpan, ...]:
    """What the plan will do; `kv` has the reused tokens, and will have those that are read."""
    prompt, rows = len(plan.rendered.ids), kv.rows

    def stored(start: int, end: int) -> int:
        reused = bisect_left(rows, min(end, plan.reused)) - bisect_left(rows, start)
        return reused + max(0, end - max(start, plan.reused))

    return _spans(request, plan, plan.reused, prompt, stored, 0)


def spans_at_end(turn: Turn, planned: TurnPlan) -> tuple[TokenSpan, ...]:
    """What the turn did; `planned` is its plan before the answer filled the context."""
    plan, rows = turn.plan, turn.cache.kv.rows
    # where messages were evicted during the turn, the messages after them were read again
    reused = min(planned.reused, common_prefix(planned.rendered.ids, plan.rendered.ids))
    read = len(turn.cache.kv.ids)

    def stored(start: int, end: int) -> int:
        return bisect_left(rows, end) - bisect_left(rows, start)

    return _spans(turn.request, plan, reused, read, stored, len(turn.answer.ids))


def message_of(place: int, request: TurnRequest, evicted_messages: int) -> int:
    """The index in the request of the message at `place` among those that are not evicted."""
    system = request.messages[0].role == "system"
    return place if system and place == 0 else place + evicted_messages


def _spans(
    request: TurnRequest, plan: TurnPlan, reused: int, read: int, stored: CountStored, written: int
) -> tuple[TokenSpan, ...]:
    """The spans of all messages; tokens after the last one belong to the answer.

    Args:
        reused: tokens of the prompt that were in the cache.
        read: tokens of prompt and answer that were read so far, including the reused ones.
        stored: how many of them are stored.
        written: tokens of the answer.
    """
    goes_on = request.messages[-1].role == "assistant"
    prompt = len(plan.rendered.ids)
    ends = [*plan.rendered.ends[: len(plan.messages) - goes_on], prompt]
    system = request.messages[0].role == "system"
    spans = [TokenSpan(i, TokenStatus.EVICTED, 0) for i in range(system, system + plan.evicted_messages)]
    if request.mode is CacheMode.OFF:
        read, reused = 0, 0
    for place, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        message = message_of(place, request, plan.evicted_messages)
        counts = _counts(start, end, reused, read, stored)
        spans += [TokenSpan(message, status, count) for status, count in counts]
    answer = message_of(len(ends) - 1, request, plan.evicted_messages)
    evicted = _evicted(prompt, min(read, prompt + written), stored)
    spans += [TokenSpan(answer, TokenStatus.EVICTED, evicted)] if evicted else []
    # the id that was sampled last is written, but not read yet
    spans += [TokenSpan(answer, TokenStatus.WRITTEN, written - evicted)] if written > evicted else []
    return tuple(sorted(_joined(spans), key=lambda span: span.message))


def _counts(
    start: int, end: int, reused: int, read: int, stored: CountStored
) -> Iterator[tuple[TokenStatus, int]]:
    """How many tokens of one message of the prompt have each status."""
    known = max(start, min(end, read))
    border = max(start, min(known, reused))
    evicted = _evicted(start, border, stored) + _evicted(border, known, stored)
    counts = {
        TokenStatus.REUSED: stored(start, border) if border > start else 0,
        TokenStatus.READ: stored(border, known) if known > border else 0,
        TokenStatus.EVICTED: evicted,
        TokenStatus.UNCACHED: end - known,
    }
    return ((status, count) for status, count in counts.items() if count)


def _evicted(start: int, end: int, stored: CountStored) -> int:
    """Tokens of a range that was read that are not stored any more."""
    return end - start - stored(start, end) if end > start else 0


def _joined(spans: list[TokenSpan]) -> Iterator[TokenSpan]:
    """One span for each message and status."""
    counts: dict[tuple[int, TokenStatus], int] = {}
    for span in spans:
        key = (span.message, span.status)
        counts[key] = counts.get(key, 0) + span.tokens
    return (TokenSpan(message, status, tokens) for (message, status), tokens in counts.items())
