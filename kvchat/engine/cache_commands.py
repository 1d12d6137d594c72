"""Commands on caches between turns: pin, spill, load, drop, fork, convert, estimate costs, inspect."""

from collections.abc import Iterator

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
"""Tokens at the end of a conversation that are predicted before and after a conversion."""
COARSENESS = (KVPrecision.FP32, KVPrecision.BF16, KVPrecision.INT8, KVPrecision.INT4)
DROPPED_BY_YOU = "you dropped it"
SPILLED_BY_YOU = "you moved it out of memory, and it is not on disk"


def execute(
    command: CacheCommand, caches: Caches, planner: Planner, loaded: LoadedModel, disk: DiskTier | None
) -> Iterator[Report]:
    """Executes a command and yields its results; the new state of all caches is reported separately.

    Raises:
        KvchatError: it can't be done; the sentence says why.
    """
    match command:
        case Pin(conversation, pinned):
            (caches.pinned.add if pinned else caches.pinned.discard)(conversation)
        case Spill(conversation):
            if (cache := caches.get(conversation)) and not caches.spill(conversation):
                caches.drop(conversation, "" if cache.prefix_only else SPILLED_BY_YOU)
        case Warm(conversation, kv):
            _load(conversation, kv, caches, disk)
        case Drop(conversation):
            caches.forget(conversation)
            caches.drop_reasons[conversation] = DROPPED_BY_YOU
        case SetBudget(budget):
            caches.budget_bytes = budget
            caches.active = ""
            caches.make_room(lambda: 0)
        case Fork(parent, child):
            caches.fork(parent, child)
        case SetPrecision(conversation, kv):
            yield _set_precision(conversation, kv, caches, loaded)
        case EstimateCost():
            yield _estimate(command, planner)
        case Inspect(request):
            yield cache_map(request, caches, planner.prompts, loaded, disk)
        case CountTokens(key, texts):
            yield TokenCounts(key, tuple(map(planner.prompts.renderer.count, texts)))


def _load(conversation: str, kv: KVPrecision, caches: Caches, disk: DiskTier | None) -> None:
    saved = disk.find(conversation) if disk else None
    if caches.get(conversation) or saved is None:
        return
    if difference := caches.fingerprint(caches.real(kv)).difference(saved.fingerprint):
        raise KvchatError(
            f"The saved cache can't be used: {difference}. The next turn reads the conversation."
        )
    caches.restore(conversation, saved, kv)


def _set_precision(conversation: str, kv: KVPrecision, caches: Caches, loaded: LoadedModel) -> Converted:
    wanted = caches.real(kv)
    cache = caches.get(conversation)
    if cache is None or not cache.kv:
        note = "nothing is cached; the next turn uses this precision"
        return Converted(conversation, wanted.value, 0, 0, 0, 0, note)
    before = cache.kv.storage_bytes
    cache.auto = kv is KVPrecision.AUTO
    if cache.precision is wanted:
        return Converted(conversation, wanted.value, before, before, 0, 0, "it is in this precision already")
    if COARSENESS.index(wanted) < COARSENESS.index(cache.precision):
        caches.discard(conversation, f"KV precision raised from {cache.precision} to {wanted}")
        note = "rounding can't be undone: the next turn reads the conversation again"
        return Converted(conversation, wanted.value, before, 0, 0, 0, note)
    return _lowered(conversation, cache, wanted, caches, loaded)


def _lowered(
    conversation: str, cache: ResidentCache, wanted: KVPrecision, caches: Caches, loaded: LoadedModel
) -> Converted:
    """Stores the cache in fewer bits, and compares the model's predictions before and after."""
    before = cache.kv.storage_bytes
    expected = _predictions(loaded, cache.kv)
    caches.convert(conversation, wanted, "you asked for it")
    found = _predictions(loaded, cache.kv)
    agreeing = sum(a == b for a, b in zip(expected, found, strict=True))
    return Converted(conversation, wanted.value, before, cache.kv.storage_bytes, len(expected), agreeing)


def _predictions(loaded: LoadedModel, kv: ConversationKV) -> list[int]:
    """The most probable token after each of the last tokens, which are read again for it."""
    ids = kv.ids
    start = kv.reachable(max(len(ids) - COMPARED_TOKENS, kv.index.last_gap_end + 1))
    if kv.states or start >= len(ids):
        return []
    kv.truncate(start)
    logits = loaded.reader(kv).read(ids[start:], keep=len(ids) - start)
    return [int(i) for i in logits.argmax(dim=-1)]


def _estimate(command: EstimateCost, planner: Planner) -> CostEstimate:
    try:
        plan = planner.plan(command.request)
    except KvchatError as error:
        return CostEstimate(command.key, 0, 0, 0, None, None, "", str(error))
    unread = len(plan.unread)
    seconds = planner.rate.seconds(unread)
    preview = planner.preview(command.request, plan)
    return CostEstimate(command.key, plan.rows + unread, plan.rows, unread, seconds, plan.miss, preview)
