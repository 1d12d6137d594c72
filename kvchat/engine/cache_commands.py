"""Acts on caches between turns: pin, move, drop, fork, store in another precision, price."""

import time
from collections.abc import Iterator
from dataclasses import replace

from kvchat.cache.kv_cache import ConversationKV
from kvchat.contract import (
    CacheCommand,
    Converted,
    CostEstimate,
    CountTokens,
    Drop,
    EstimateCost,
    Fork,
    Inspect,
    KVPrecision,
    Pin,
    Report,
    SetBudget,
    SetPrecision,
    Spill,
    TokenCounts,
    Warm,
)
from kvchat.engine.cache_manager import Caches, ResidentCache
from kvchat.engine.cache_map import cache_map
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.planner import Planner
from kvchat.errors import KvchatError

COMPARED_TOKENS = 64
"""Of the end of a conversation: how many of them the model would still choose after a conversion."""
COARSENESS = (KVPrecision.FP32, KVPrecision.BF16, KVPrecision.INT8, KVPrecision.INT4)
DROPPED_BY_YOU = "you dropped it"
SPILLED_BY_YOU = "you moved it out of memory, and it is not on disk"


def do(
    act: CacheCommand, caches: Caches, planner: Planner, loaded: LoadedModel, disk: DiskTier | None
) -> Iterator[Report]:
    """Does it, and yields what there is to say besides the new state of all caches.

    Raises:
        KvchatError: it can't be done; the sentence says why.
    """
    match act:
        case Pin(conversation, pinned):
            caches.pin(conversation, pinned=pinned)
        case Spill(conversation):
            if (kept := caches.get(conversation)) and not caches.spill(conversation):
                caches.drop(conversation, "" if kept.prefix_only else SPILLED_BY_YOU)
        case Warm(conversation, kv):
            _warm(conversation, kv, caches, disk)
        case Drop(conversation):
            caches.forget(conversation)
            caches.drop_reasons[conversation] = DROPPED_BY_YOU
        case SetBudget(budget):
            caches.budget_bytes = budget
            caches.active = ""
            caches.make_room(lambda: 0)
        case Fork(parent, child):
            _fork(parent, child, caches)
        case SetPrecision(conversation, kv):
            yield _set_precision(conversation, kv, caches, loaded)
        case EstimateCost():
            yield _quote(act, planner)
        case Inspect():
            yield cache_map(act, caches, planner, loaded, disk)
        case CountTokens(key, texts):
            yield TokenCounts(key, tuple(map(planner.count, texts)))


def _warm(conversation: str, kv: KVPrecision, caches: Caches, disk: DiskTier | None) -> None:
    saved = disk.find(conversation) if disk else None
    if caches.get(conversation) or saved is None:
        return
    if difference := caches.fingerprint(caches.real(kv)).difference(saved.fingerprint):
        raise KvchatError(
            f"The saved cache can't be used: {difference}. The next turn reads the conversation."
        )
    caches.restore(conversation, saved, kv)


def _fork(parent: str, child: str, caches: Caches) -> None:
    if kept := caches.get(parent):
        fork = replace(kept, kv=kept.kv.fork(len(kept.kv.ids)), last_used=time.time())
        caches.put(child, fork)
        caches.log_fork(parent, child, len(fork.kv))


def _set_precision(conversation: str, kv: KVPrecision, caches: Caches, loaded: LoadedModel) -> Converted:
    wanted = caches.real(kv)
    kept = caches.get(conversation)
    if kept is None or not kept.kv:
        return Converted(
            conversation, wanted.value, 0, 0, 0, 0, "nothing is cached; the next turn is stored so"
        )
    before = kept.kv.storage_bytes
    kept.auto = kv is KVPrecision.AUTO
    if kept.precision is wanted:
        return Converted(conversation, wanted.value, before, before, 0, 0, "it is stored so already")
    if COARSENESS.index(wanted) < COARSENESS.index(kept.precision):
        caches.discard(conversation, f"KV precision raised from {kept.precision} to {wanted}")
        note = "what was rounded can't come back: the next turn reads the conversation again"
        return Converted(conversation, wanted.value, before, 0, 0, 0, note)
    return _lowered(conversation, kept, wanted, caches, loaded)


def _lowered(
    conversation: str, kept: ResidentCache, wanted: KVPrecision, caches: Caches, loaded: LoadedModel
) -> Converted:
    """Stores the cache in fewer bits, and compares what the model would say with what it would have said."""
    before = kept.kv.storage_bytes
    was = _choices(loaded, kept.kv)
    caches.convert(conversation, wanted, "you asked for it")
    now = _choices(loaded, kept.kv)
    agreeing = sum(a == b for a, b in zip(was, now, strict=True))
    return Converted(conversation, wanted.value, before, kept.kv.storage_bytes, len(was), agreeing)


def _choices(loaded: LoadedModel, kv: ConversationKV) -> list[int]:
    """What the model finds most probable after each of the last tokens, which are read again for it."""
    ids = kv.ids
    start = kv.reachable(max(len(ids) - COMPARED_TOKENS, kv.last_gap_end + 1))
    if kv.states or start >= len(ids):
        return []
    kv.truncate(start)
    logits = loaded.reader(kv).read(ids[start:], keep=len(ids) - start)
    return [int(i) for i in logits.argmax(dim=-1)]


def _quote(ask: EstimateCost, planner: Planner) -> CostEstimate:
    try:
        plan = planner.plan(ask.request)
    except KvchatError as error:
        return CostEstimate(ask.key, 0, 0, 0, None, None, "", str(error))
    unread = len(plan.unread)
    price = planner.seconds(unread)
    preview = planner.preview(ask.request, plan)
    return CostEstimate(ask.key, plan.rows + unread, plan.rows, unread, price, plan.miss, preview)
