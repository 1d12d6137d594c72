"""What a turn does with the tokens of every message: reused, read, written, evicted, or never cached.

It knows where messages end and which tokens are stored; it refuses to know tensors.
"""

from collections import Counter
from collections.abc import Iterable

from kvchat.cache.kv import ConversationKV
from kvchat.cache.prefix import common_prefix
from kvchat.contract import CacheMode, Fate, Span, TurnRequest
from kvchat.engine.plan import Plan
from kvchat.engine.turn import Turn


def spans_at_start(request: TurnRequest, plan: Plan, kv: ConversationKV) -> tuple[Span, ...]:
    """What the plan will do; `kv` holds what is reused."""
    prompt = len(plan.rendered.ids)
    stored = {*kv.rows, *range(plan.reused, prompt)}
    off = request.mode is CacheMode.OFF
    return _spans(request, plan, [_fate(t, plan.reused, prompt, stored, off=off) for t in range(prompt)])


def spans_at_end(turn: Turn, planned: Plan) -> tuple[Span, ...]:
    """What the turn did; `planned` is how it began, before its answer filled the context."""
    request, plan, kv = turn.request, turn.plan, turn.kept.kv
    prompt, read = len(plan.rendered.ids), len(kv.ids)
    # where messages were left out in mid-turn, what came after them was read again
    reused = min(planned.reused, common_prefix(planned.rendered.ids, plan.rendered.ids))
    off = request.mode is CacheMode.OFF
    stored = set(kv.rows)
    fates = [_fate(t, reused, read, stored, off=off) for t in range(prompt)]
    written = range(prompt, prompt + len(turn.answer.ids))
    # an id that was sampled last is written, and not read yet
    fates += [Fate.EVICTED if t < read and t not in stored else Fate.WRITTEN for t in written]
    return _spans(request, plan, fates)


def message_of(place: int, request: TurnRequest, left_out: int) -> int:
    """The place in the request of the message at `place` among those that are not left out."""
    system = request.messages[0].role == "system"
    return place if system and place == 0 else place + left_out


def _fate(token: int, reused: int, read: int, stored: set[int], *, off: bool) -> Fate:
    """Of a token of the prompt; `read` of them went through the model by now."""
    if off or token >= read:
        return Fate.UNCACHED
    if token not in stored:
        return Fate.EVICTED
    return Fate.REUSED if token < reused else Fate.READ


def _spans(request: TurnRequest, plan: Plan, fates: list[Fate]) -> tuple[Span, ...]:
    """Per message, in order of first appearance; what stands after the last message belongs to the answer."""
    goes_on = request.messages[-1].role == "assistant"
    ends = [*plan.rendered.ends[: len(plan.messages) - goes_on], len(fates)]
    system = request.messages[0].role == "system"
    spans = [Span(i, Fate.EVICTED, 0) for i in range(system, system + plan.left_out)]
    for place, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        message = message_of(place, request, plan.left_out)
        spans += [Span(message, fate, count) for fate, count in _counted(fates[start:end])]
    return tuple(sorted(spans, key=lambda span: span.message))


def _counted(fates: Iterable[Fate]) -> Iterable[tuple[Fate, int]]:
    return Counter(fates).items()
