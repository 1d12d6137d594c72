"""The caches of all conversations: which are in memory, which on disk, and which is evicted for another.

Carries out what `memory_budget` decides, and logs every step as a `CacheEvent`. Must not depend on prompts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import psutil

from kvchat.cache.fingerprint import Fingerprint
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.memory_budget import Candidate, EvictionAction, eviction_order, next_eviction
from kvchat.contract import (
    CacheEvent,
    CacheEventKind,
    KVPrecision,
    PoolState,
    PromptMessage,
    WarmCache,
)
from kvchat.engine.disk_tier import DiskTier, SavedCache
from kvchat.engine.event_log import EventLog
from kvchat.errors import KvchatError

NewKV = Callable[[KVPrecision], ConversationKV]


class BudgetFullError(KvchatError):
    """The budget is too small for what has to be read, even with every other cache evicted."""


@dataclass(slots=True)
class ResidentCache:
    """A conversation's cache in memory, and the messages it was read from."""

    kv: ConversationKV
    precision: KVPrecision
    """Of the stored keys and values; never `auto`."""
    auto: bool = False
    """Whether the precision may be lowered when memory is full."""
    messages: Sequence[PromptMessage] = ()
    evicted_messages: int = 0
    system_end: int = 0
    """Tokens of the system prompt."""
    prefix_only: bool = False
    """Whether only its system prefix is left in memory; all of it may be on disk."""
    persist: bool = True
    """Whether it may be saved to disk."""
    last_used: float = field(default_factory=time.time)

    @property
    def can_save(self) -> bool:
        """A mere prefix would replace the whole cache on disk."""
        return self.persist and not self.prefix_only

    @property
    def can_quantise(self) -> bool:
        """Whether it may be stored in 8 bits when memory is full."""
        exact = self.precision in (KVPrecision.FP32, KVPrecision.BF16)
        return exact and self.auto and not self.prefix_only


class DraftCache(Protocol):
    """The cache of a draft model, which belongs to no conversation and counts in the same budget."""

    free_bytes: Callable[[], int]
    """Bytes that are left in the budget."""

    @property
    def storage_bytes(self) -> int:
        """Bytes allocated."""
        ...

    def clear(self) -> int:
        """Frees it; returns how many tokens it had."""
        ...


class Caches:
    """Every cache there is."""

    def __init__(
        self,
        new_kv: NewKV,
        fingerprint: Fingerprint,
        budget_bytes: int,
        disk: DiskTier | None,
        event_log: EventLog,
    ) -> None:
        self._new_kv = new_kv
        self._fingerprint = fingerprint
        self._disk = disk
        self._event_log = event_log
        self._resident: dict[str, ResidentCache] = {}
        self._draft_cache: DraftCache | None = None
        self.pinned: set[str] = set()
        """Conversations whose caches are evicted after the others."""
        self.budget_bytes = budget_bytes
        self.active = ""
        """The conversation whose cache is never evicted."""
        self.drop_reasons: dict[str, str] = {}
        """Conversation → why its cache is not in memory any more."""

    def fingerprint(self, precision: KVPrecision) -> Fingerprint:
        """The fingerprint of caches stored in that precision."""
        return replace(self._fingerprint, kv=precision.value)

    def real(self, precision: KVPrecision) -> KVPrecision:
        """The precision that `auto` means with this model."""
        return KVPrecision(self._fingerprint.kv) if precision is KVPrecision.AUTO else precision

    def is_stored_as(self, cache: ResidentCache, requested: KVPrecision) -> bool:
        """Whether a cache has the requested precision; `auto` also allows one that was lowered."""
        return cache.precision is self.real(requested) or (requested is KVPrecision.AUTO and cache.auto)

    def get(self, conversation: str) -> ResidentCache | None:
        """The cache in memory."""
        return self._resident.get(conversation)

    def others(self, conversation: str) -> Iterator[tuple[str, ResidentCache]]:
        """Every other cache in memory that is not empty."""
        return ((name, cache) for name, cache in self._resident.items() if name != conversation and cache.kv)

    def put(self, conversation: str, cache: ResidentCache) -> ResidentCache:
        """Makes this the conversation's cache."""
        self._resident[conversation] = cache
        return cache

    def empty(self, precision: KVPrecision) -> ResidentCache:
        """A new, empty cache."""
        return ResidentCache(self._new_kv(precision), self.real(precision), precision is KVPrecision.AUTO)

    def fork(self, parent: str, child: str) -> None:
        """Gives a new conversation the cache of another, copy-on-write; nothing where there is none."""
        if cache := self.get(parent):
            forked = replace(cache, kv=cache.kv.fork(len(cache.kv.ids)), last_used=time.time())
            self.put(child, forked)
            note = f"shares the memory of {parent}"
            self._event_log.log(child, CacheEventKind.FORK, len(forked.kv), note=note)

    def share_prefix(
        self, conversation: str, source: str, tokens: int, precision: KVPrecision
    ) -> ResidentCache:
        """Gives a conversation the first tokens of another's cache, copy-on-write."""
        cache = self.empty(precision)
        cache.kv = self._resident[source].kv.fork(tokens)
        self._event_log.log(conversation, CacheEventKind.SHARE, tokens, note=f"from {source}")
        return self.put(conversation, cache)

    def restore(
        self, conversation: str, saved: SavedCache, precision: KVPrecision, disk: DiskTier | None = None
    ) -> ResidentCache:
        """Loads a cache from disk into memory, and then replaces the one in memory.

        Args:
            disk: where `saved` was found; None is the disk that these caches are saved on.

        Raises:
            KvchatError: the budget is too small, or the saved cache is damaged.
        """
        disk = disk or self._disk
        assert disk is not None
        started = time.perf_counter()
        cache = self.empty(precision)
        self.make_room(lambda: cache.kv.bytes_at(saved.most_rows))
        disk.restore(saved, cache.kv, self.fingerprint(cache.precision))
        if before := self._resident.get(conversation):
            before.kv.clear()
        took = time.perf_counter() - started
        self._event_log.log(
            conversation, CacheEventKind.RESTORE, saved.rows, size=cache.kv.storage_bytes, seconds=took
        )
        return self.put(conversation, cache)

    def discard(self, conversation: str, why: str) -> None:
        """Frees a cache in memory; `why` explains the next miss."""
        if cache := self._resident.pop(conversation, None):
            cache.kv.clear()
        self.drop_reasons[conversation] = why

    def forget(self, conversation: str) -> None:
        """Removes a conversation's cache from memory and disk, and everything recorded about it."""
        self.discard(conversation, "")
        self.drop_reasons.pop(conversation, None)
        self.pinned.discard(conversation)
        if self._disk:
            self._disk.remove(conversation)

    def add_draft_cache(self, cache: DraftCache) -> None:
        """Counts a draft model's cache in the budget; it is evicted before any conversation's."""
        self._draft_cache = cache
        cache.free_bytes = lambda: self.budget_bytes - self.used_bytes

    @property
    def draft_bytes(self) -> int:
        """Bytes of the draft model's cache."""
        return self._draft_cache.storage_bytes if self._draft_cache else 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all caches in memory; shared memory counts once."""
        memory: dict[int, int] = {}
        for cache in self._resident.values():
            memory |= cache.kv.storages()
        return sum(memory.values()) + self.draft_bytes

    def make_room(self, needed_bytes: Callable[[], int]) -> None:
        """Evicts caches until so many more bytes fit into the budget; call it before allocating them.

        `needed_bytes` is evaluated after each eviction: memory that is no longer shared needs no copy.

        Raises:
            BudgetFullError: they don't fit even with every cache but the active one evicted.
        """
        while self.used_bytes + needed_bytes() > self.budget_bytes:
            if self._draft_cache and self.draft_bytes:
                self._evict_draft(self._draft_cache)
                continue
            chosen = next_eviction(self._candidates())
            if chosen is None:
                raise BudgetFullError(
                    f"The KV budget of {self.budget_bytes / 1e6:,.0f} MB is full. Raise it with /budget, "
                    "or choose a smaller KV precision with /kv."
                )
            self._evict(*chosen)

    def _evict_draft(self, cache: DraftCache) -> None:
        """Evicts the draft model's cache and logs the event on the active, or latest, conversation."""
        latest = max(self._resident, key=lambda name: self._resident[name].last_used, default="")
        size, tokens = cache.storage_bytes, cache.clear()
        note = "the draft model's own cache: the KV budget was full"
        self._event_log.log(self.active or latest, CacheEventKind.DROP, tokens, size=size, note=note)

    def _candidates(self) -> list[Candidate]:
        return [
            Candidate(
                name,
                cache.last_used,
                pinned=name in self.pinned,
                active=name == self.active,
                can_spill=self._disk is not None and cache.can_save,
                can_quantise=cache.can_quantise,
                prefix_only=cache.prefix_only,
            )
            for name, cache in self._resident.items()
            if cache.kv
        ]

    def _evict(self, conversation: str, action: EvictionAction) -> None:
        if action is EvictionAction.QUANTISE:
            self.convert(conversation, KVPrecision.INT8, "the KV budget was full and no disk may be used")
        elif action is EvictionAction.DROP or not self.spill(conversation):
            self.drop(conversation, "dropped from memory because the KV budget was full")

    def spill(self, conversation: str) -> bool:
        """Moves a cache to disk; False where that failed, and then it is still in memory."""
        cache = self._resident[conversation]
        fingerprint = self.fingerprint(cache.precision)
        if not (self._disk and cache.can_save and self._disk.save_now(conversation, fingerprint, cache.kv)):
            return False
        self._event_log.log(conversation, CacheEventKind.SPILL, len(cache.kv), size=cache.kv.storage_bytes)
        self._reduce_to_prefix(conversation, "")
        return True

    def drop(self, conversation: str, why: str) -> None:
        """Frees a cache in memory; the saved one stays on disk."""
        kv = self._resident[conversation].kv
        self._event_log.log(conversation, CacheEventKind.DROP, len(kv), size=kv.storage_bytes, note=why)
        self._reduce_to_prefix(conversation, why)

    def _reduce_to_prefix(self, conversation: str, why: str) -> None:
        """Frees all but the system prefix; frees that too if another cache has it, or it is all there is."""
        cache = self._resident[conversation]
        kv = cache.kv
        self.drop_reasons[conversation] = why
        prefix = kv.ids[: cache.system_end]
        elsewhere = any(other.kv.ids[: len(prefix)] == prefix for _, other in self.others(conversation))
        shrinkable = not kv.states and kv.block == 1 and kv.index.first_gap >= len(prefix)
        frees = kv.bytes_at(len(prefix)) < kv.storage_bytes  # both are multiples of the growth step
        if not prefix or elsewhere or not shrinkable or not frees:
            del self._resident[conversation]
            kv.clear()
        else:
            cache.prefix_only = True
            kv.truncate(len(prefix))
            kv.select(range(len(prefix)))

    def convert(self, conversation: str, precision: KVPrecision, why: str) -> None:
        """Stores a cache in fewer bits."""
        cache = self._resident[conversation]
        before = cache.kv.storage_bytes
        cache.kv.store_in(self._new_kv(precision).layers)
        cache.precision = precision
        after = cache.kv.storage_bytes
        note = f"{before / 1e6:,.1f} MB → {after / 1e6:,.1f} MB as {precision.value}: {why}"
        self._event_log.log(conversation, CacheEventKind.CONVERT, len(cache.kv), size=after, note=note)

    def save(self, conversation: str) -> None:
        """Queues what is new for the disk; returns at once."""
        cache = self._resident.get(conversation)
        if self._disk and cache and cache.kv and cache.can_save:
            self._disk.save(conversation, self.fingerprint(cache.precision), cache.kv)

    def save_copy(self, conversation: str, disk: DiskTier) -> None:
        """Replaces what another disk has of this conversation by the whole cache; waits until it is written.

        Raises:
            KvchatError: it can't be saved.
        """
        failures: list[str] = []
        disk.on_saved = lambda result: failures.append(result.error) if result.error else None
        disk.remove(conversation)
        cache = self._resident.get(conversation)
        if cache is None or not cache.kv or cache.prefix_only:
            return
        copy = cache.kv.fork(len(cache.kv.ids))
        copy.saved_rows = 0
        if not disk.save_now(conversation, self.fingerprint(cache.precision), copy):
            raise KvchatError(f"The cache can't be saved: {' '.join(failures)}")

    def state(self, events: Sequence[CacheEvent] = ()) -> PoolState:
        """All caches, for the screen."""
        next_evicted = [each.conversation for each in eviction_order(self._candidates())][:1]
        saved = self._disk.sizes() if self._disk else {}
        resident = [
            WarmCache(
                name,
                len(cache.kv),
                cache.kv.storage_bytes,
                saved.get(name, 0),
                cache.precision.value,
                pinned=name in self.pinned,
                next_evicted=next_evicted == [name],
                last_used=cache.last_used,
            )
            for name, cache in self._resident.items()
            if cache.kv
        ]
        names = {each.conversation for each in resident}
        on_disk = [
            WarmCache(name, 0, 0, disk_bytes=size) for name, size in saved.items() if name not in names
        ]
        return PoolState(
            (*resident, *on_disk),
            self.used_bytes,
            self.budget_bytes,
            sum(saved.values()),
            self._disk.cap_bytes if self._disk else 0,
            tuple(events),
            int(psutil.virtual_memory().available),
            self.draft_bytes,
        )

    def close(self) -> None:
        """Saves what is not saved, and frees everything."""
        for name in self._resident:
            self.save(name)
        if self._disk:
            self._disk.close()
        self._resident.clear()
