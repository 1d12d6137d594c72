"""What a turn does with the tokens of every message: reused, read, written, evicted, or never cached.

It knows where messages end and which tokens are stored; it refuses to know tensors. It counts in ranges: a
turn waits for it.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.prefix import common_prefix
from kvchat.contract import CacheMode, TokenSpan, TokenStatus, TurnRequest
from kvchat.engine.planner import TurnPlan
from kvchat.engine.turn import Turn

Stored = Callable[[int, int], int]
"""How many tokens of the history from one place up to another are stored."""


def spans_at_start(request: TurnRequest, plan: TurnPlan, kv: ConversationKV) -> tuple[TokenSpan, ...]:
    """What the plan will do; `kv` holds what is reused, and what is read will be there too."""
    prompt, rows = len(plan.rendered.ids), kv.rows

    def stored(start: int, end: int) -> int:
        kept = bisect_left(rows, min(end, plan.reused)) - bisect_left(rows, start)
        return kept + max(0, end - max(start, plan.reused))

    return _spans(request, plan, plan.reused, prompt, stored, 0)


def spans_at_end(turn: Turn, planned: TurnPlan) -> tuple[TokenSpan, ...]:
    """What the turn did; `planned` is how it began, before its answer filled the context."""
    plan, rows = turn.plan, turn.kept.kv.rows
    # where messages were left out in mid-turn, what came after them was read again
    reused = min(planned.reused, common_prefix(planned.rendered.ids, plan.rendered.ids))
    read = len(turn.kept.kv.ids)

    def stored(start: int, end: int) -> int:
        return bisect_left(rows, end) - bisect_left(rows, start)

    return _spans(turn.request, plan, reused, read, stored, len(turn.answer.ids))


def message_of(place: int, request: TurnRequest, evicted_messages: int) -> int:
    """The place in the request of the message at `place` among those that are not left out."""
    system = request.messages[0].role == "system"
    return place if system and place == 0 else place + evicted_messages


def _spans(
    request: TurnRequest, plan: TurnPlan, reused: int, read: int, stored: Stored, written: int
) -> tuple[TokenSpan, ...]:
    """Per message; what stands after the last one belongs to the answer.

    Args:
        reused: tokens of the prompt that were in the cache.
        read: tokens of prompt and answer that went through the model by now, those included.
        stored: of these.
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
        spans += [TokenSpan(message, fate, count) for fate, count in _fates(start, end, reused, read, stored)]
    answer = message_of(len(ends) - 1, request, plan.evicted_messages)
    gone = _gone(prompt, min(read, prompt + written), stored)
    spans += [TokenSpan(answer, TokenStatus.EVICTED, gone)] if gone else []
    # an id that was sampled last is written, and not read yet
    spans += [TokenSpan(answer, TokenStatus.WRITTEN, written - gone)] if written > gone else []
    return tuple(sorted(_joined(spans), key=lambda span: span.message))


def _fates(start: int, end: int, reused: int, read: int, stored: Stored) -> Iterator[tuple[TokenStatus, int]]:
    """What happened to the tokens of one message of the prompt, and to how many of them."""
    known = max(start, min(end, read))
    border = max(start, min(known, reused))
    gone = _gone(start, border, stored) + _gone(border, known, stored)
    counts = {
        TokenStatus.REUSED: stored(start, border) if border > start else 0,
        TokenStatus.READ: stored(border, known) if known > border else 0,
        TokenStatus.EVICTED: gone,
        TokenStatus.UNCACHED: end - known,
    }
    return ((fate, count) for fate, count in counts.items() if count)


def _gone(start: int, end: int, stored: Stored) -> int:
    """Tokens that were read and are not stored any more."""
    return end - start - stored(start, end) if end > start else 0


def _joined(spans: list[TokenSpan]) -> Iterator[TokenSpan]:
    """One span for each message and fate."""
    counts: dict[tuple[int, TokenStatus], int] = {}
    for span in spans:
        key = (span.message, span.status)
        counts[key] = counts.get(key, 0) + span.tokens
    return (TokenSpan(message, fate, tokens) for (message, fate), tokens in counts.items())
