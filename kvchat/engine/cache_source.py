"""Which cache a turn starts from: its own, a saved one, or the shared prefix of another conversation's."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.prefix import reusable_prefix
from kvchat.contract import CacheMode, TurnRequest
from kvchat.engine.cache_manager import Caches
from kvchat.engine.disk_tier import DiskTier, SavedCache
from kvchat.engine.eviction import leaves_gap
from kvchat.errors import KvchatError

LEAST_SHARED = 16
"""Tokens that another conversation's cache must save before its prefix is shared."""


@dataclass(frozen=True, slots=True)
class OwnCache:
    """The conversation's cache in memory."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The prefix of another conversation's cache in memory."""

    conversation: str


Source = OwnCache | SharedPrefix | SavedCache


class Reuse(NamedTuple):
    """What a turn reuses."""

    source: Source
    tokens: int
    """Tokens of the prompt that are not read again."""
    rows: int
    """Their rows in the cache: fewer after an eviction that left a gap."""
    refused: str
    """Why a cache of the conversation can't be used; empty if none was refused."""


def reusable(kv: ConversationKV, prompt: Sequence[int], *, gaps: bool = False) -> int:
    """Tokens of the prompt that a cache stores and can return to; leaves at least one to read.

    Args:
        gaps: whether tokens after an evicted one may be reused, which is approximate.
    """
    same = reusable_prefix(kv.ids, prompt)
    return kv.reachable(same if gaps else min(same, kv.index.first_gap))


def find_source(request: TurnRequest, ids: Sequence[int], caches: Caches, disk: DiskTier | None) -> Reuse:
    """The cache with the most reusable tokens of the prompt `ids`; memory is preferred to disk."""
    if request.mode is not CacheMode.ON:
        return Reuse(OwnCache(), 0, 0, "")
    gaps = leaves_gap(request.policy)
    source: Source = OwnCache()
    tokens, refused = 0, ""
    rows: Sequence[int] | None = None
    own = caches.get(request.conversation)
    if own and caches.is_stored_as(own, request.kv):
        tokens, rows = reusable(own.kv, ids, gaps=gaps), own.kv.rows
    elif own:
        refused = f"KV precision changed: {own.precision} → {caches.real(request.kv)}"
    if own is None or refused or own.prefix_only:
        saved, why = _saved(request, caches, disk)
        refused = refused or why
        if saved and (restorable := saved.reusable(ids, gaps=gaps)) > tokens:
            source, tokens, rows = saved, restorable, saved.chain.rows
    shared, owner = max(
        (
            (reusable(other.kv, ids), name)
            for name, other in caches.others(request.conversation)
            if other.precision is caches.real(request.kv)
        ),
        default=(0, ""),
    )
    if shared > tokens + LEAST_SHARED:
        source, tokens, rows = SharedPrefix(owner), shared, None
    return Reuse(source, tokens, tokens if rows is None else bisect_left(rows, tokens), refused)


def _saved(request: TurnRequest, caches: Caches, disk: DiskTier | None) -> tuple[SavedCache | None, str]:
    """(the saved cache if it can be used, else why not)."""
    if disk is None or not request.persist:
        return None, ""
    try:
        saved = disk.find(request.conversation)
    except KvchatError as error:
        return None, str(error)
    if saved is None:
        return None, ""
    difference = caches.fingerprint(caches.real(request.kv)).difference(saved.fingerprint)
    needed = caches.empty(request.kv).kv.bytes_at(saved.most_rows)
    if not difference and needed > caches.budget_bytes:
        difference = f"the saved cache takes {needed / 1e6:,.1f} MB, more than the KV budget"
    return (None, difference) if difference else (saved, "")
