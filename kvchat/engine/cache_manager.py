"""The caches of all conversations: which are in memory, which on disk, and who makes room for whom.

It carries out what `pool` decides, and tells every step as a `CacheEvent`. It knows conversations by id; it
refuses to know prompts and texts, but for the messages a cache was read from, which it keeps beside it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import psutil

from kvchat.cache.fingerprint import Fingerprint
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.memory_budget import Held, Relief, eviction_order, next_relief
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
    """The budget can't hold what has to be read, even with every other cache gone."""


@dataclass(slots=True)
class ResidentCache:
    """A conversation's cache in memory, and what it was read from."""

    kv: ConversationKV
    precision: KVPrecision
    """As it is stored; never `auto`."""
    auto: bool = False
    """Whether the precision may be lowered under pressure."""
    messages: Sequence[PromptMessage] = ()
    evicted_messages: int = 0
    system_end: int = 0
    """Tokens of the system prompt."""
    prefix_only: bool = False
    """Whether it was taken out of memory but for the system prefix; the whole of it may lie on disk."""
    persist: bool = True
    """Whether it may go to disk."""
    last_used: float = field(default_factory=time.time)


class DraftCache(Protocol):
    """Holds a cache that is no conversation's, under the same budget."""

    room: Callable[[], int]
    """Bytes that the budget has left for it."""

    @property
    def storage_bytes(self) -> int:
        """What it holds."""
        ...

    def clear(self) -> int:
        """Frees that; returns how many tokens it was."""
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
        self._kept: dict[str, ResidentCache] = {}
        self._pinned: set[str] = set()
        self._guest: DraftCache | None = None
        self.budget_bytes = budget_bytes
        self.active = ""
        """The conversation that never makes room."""
        self.drop_reasons: dict[str, str] = {}
        """Why a conversation's cache is not there any more, for the next one who looks for it."""

    def fingerprint(self, precision: KVPrecision) -> Fingerprint:
        """Of caches stored in that precision."""
        return replace(self._fingerprint, kv=precision.value)

    def real(self, precision: KVPrecision) -> KVPrecision:
        """The precision that `auto` means with this model."""
        return KVPrecision(self._fingerprint.kv) if precision is KVPrecision.AUTO else precision

    def get(self, conversation: str) -> ResidentCache | None:
        """The cache in memory."""
        return self._kept.get(conversation)

    def others(self, conversation: str) -> Iterator[tuple[str, ResidentCache]]:
        """Every other cache in memory that holds something."""
        return ((name, kept) for name, kept in self._kept.items() if name != conversation and kept.kv)

    def put(self, conversation: str, kept: ResidentCache) -> ResidentCache:
        """Makes this the conversation's cache."""
        self._kept[conversation] = kept
        return kept

    def empty(self, precision: KVPrecision) -> ResidentCache:
        """A new cache that holds nothing."""
        return ResidentCache(self._new_kv(precision), self.real(precision), precision is KVPrecision.AUTO)

    def restore(
        self, conversation: str, saved: SavedCache, precision: KVPrecision, disk: DiskTier | None = None
    ) -> ResidentCache:
        """Brings a cache from disk into memory; what was there is replaced once the new one is right.

        Args:
            disk: where `saved` was found; None is the disk that these caches are saved on.

        Raises:
            KvchatError: there is no room, or what is on disk is damaged.
        """
        disk = disk or self._disk
        assert disk is not None
        started = time.perf_counter()
        kept = self.empty(precision)
        self.make_room(lambda: kept.kv.bytes_at(saved.most_rows))
        disk.restore(saved, kept.kv, self.fingerprint(kept.precision))
        if before := self._kept.get(conversation):
            before.kv.clear()
        took = time.perf_counter() - started
        self._event_log.log(
            conversation, CacheEventKind.RESTORE, saved.rows, size=kept.kv.storage_bytes, seconds=took
        )
        return self.put(conversation, kept)

    def discard(self, conversation: str, why: str) -> None:
        """Frees a cache in memory; `why` explains the next read."""
        if kept := self._kept.pop(conversation, None):
            kept.kv.clear()
        self.drop_reasons[conversation] = why

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache in memory and on disk, as if it had never been."""
        self.discard(conversation, "")
        self.drop_reasons.pop(conversation, None)
        self._pinned.discard(conversation)
        if self._disk:
            self._disk.remove(conversation)

    def host(self, guest: DraftCache) -> None:
        """Counts a draft model's cache as well; it makes room before any conversation does."""
        self._guest = guest
        guest.room = lambda: self.budget_bytes - self.used_bytes

    @property
    def draft_bytes(self) -> int:
        """Bytes of the draft model's cache."""
        return self._guest.storage_bytes if self._guest else 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all caches in memory; what forks share counts once."""
        held: dict[int, int] = {}
        for kept in self._kept.values():
            held |= kept.kv.storages()
        return sum(held.values()) + self.draft_bytes

    def make_room(self, needed_bytes: Callable[[], int]) -> None:
        """Frees memory until so many more bytes fit into the budget; asked before they are allocated.

        How many that is can change on the way: memory shared with a cache that went need not be copied.

        Raises:
            BudgetFullError: they don't, even with every cache but the active one gone.
        """
        while self.used_bytes + needed_bytes() > self.budget_bytes:
            if self._guest and self.draft_bytes:
                self._evict_least_recent(self._guest)
                continue
            relief = next_relief(self._held())
            if relief is None:
                raise BudgetFullError(
                    f"The KV budget of {self.budget_bytes / 1e6:,.0f} MB is full. Raise it with /budget, "
                    "or choose a smaller KV precision with /kv."
                )
            self._relieve(*relief)

    def _evict_least_recent(self, guest: DraftCache) -> None:
        """Told to whom it guessed for: the conversation used last."""
        lately = max(self._kept, key=lambda name: self._kept[name].last_used, default="")
        size, tokens = guest.storage_bytes, guest.clear()
        note = "the draft model's own cache: the KV budget was full"
        self._event_log.log(self.active or lately, CacheEventKind.DROP, tokens, size=size, note=note)

    def _held(self) -> list[Held]:
        return [
            Held(
                name,
                kept.last_used,
                pinned=name in self._pinned,
                active=name == self.active,
                can_spill=self._may_be_saved(kept),
                can_quantise=self._may_be_quantised(kept),
                prefix_only=kept.prefix_only,
            )
            for name, kept in self._kept.items()
            if kept.kv
        ]

    def _may_be_saved(self, kept: ResidentCache) -> bool:
        """A mere prefix would replace the whole that lies on disk."""
        return self._disk is not None and kept.persist and not kept.prefix_only

    def _may_be_quantised(self, kept: ResidentCache) -> bool:
        exact = kept.precision in (KVPrecision.FP32, KVPrecision.BF16)
        return exact and kept.auto and not kept.prefix_only

    def _relieve(self, conversation: str, relief: Relief) -> None:
        if relief is Relief.QUANTISE:
            self.convert(conversation, KVPrecision.INT8, "the KV budget was full and no disk may be used")
        elif relief is Relief.SPILL and self.spill(conversation):
            pass
        else:
            self.drop(conversation, "dropped from memory because the KV budget was full")

    def spill(self, conversation: str) -> bool:
        """Moves a cache to disk; False where that failed, and then it is still in memory."""
        kept = self._kept[conversation]
        fingerprint = self.fingerprint(kept.precision)
        saved = (
            self._may_be_saved(kept)
            and self._disk
            and self._disk.save_now(conversation, fingerprint, kept.kv)
        )
        if not saved:
            return False
        self._event_log.log(conversation, CacheEventKind.SPILL, len(kept.kv), size=kept.kv.storage_bytes)
        self._leave_prefix(conversation, "")
        return True

    def drop(self, conversation: str, why: str) -> None:
        """Frees a cache in memory; what is on disk stays."""
        kept = self._kept[conversation]
        self._event_log.log(
            conversation, CacheEventKind.DROP, len(kept.kv), size=kept.kv.storage_bytes, note=why
        )
        self._leave_prefix(conversation, why)

    def _leave_prefix(self, conversation: str, why: str) -> None:
        """Keeps nothing but the system prefix, if no other cache holds that; a prefix goes for good."""
        kept = self._kept[conversation]
        self.drop_reasons[conversation] = why
        prefix = kept.kv.ids[: kept.system_end]
        shared = any(other.kv.ids[: len(prefix)] == prefix for _, other in self.others(conversation))
        shrinkable = not kept.kv.states and kept.kv.block == 1 and kept.kv.first_gap >= len(prefix)
        frees = kept.kv.bytes_at(len(prefix)) < kept.kv.storage_bytes  # both grow in steps
        if not prefix or shared or not shrinkable or not frees:
            del self._kept[conversation]
            kept.kv.clear()
        else:
            kept.prefix_only = True
            kept.kv.truncate(len(prefix))
            kept.kv.select(range(len(prefix)))

    def convert(self, conversation: str, precision: KVPrecision, why: str) -> None:
        """Stores a cache in fewer bits."""
        kept = self._kept[conversation]
        before = kept.kv.storage_bytes
        kept.kv.store_in(self._new_kv(precision).layers)
        kept.precision = precision
        note = f"{before / 1e6:,.1f} MB → {kept.kv.storage_bytes / 1e6:,.1f} MB as {precision.value}: {why}"
        self._event_log.log(
            conversation, CacheEventKind.CONVERT, len(kept.kv), size=kept.kv.storage_bytes, note=note
        )

    def save(self, conversation: str) -> None:
        """Sends what is new to the disk; returns at once."""
        kept = self._kept.get(conversation)
        if self._disk and kept and kept.kv and self._may_be_saved(kept):
            self._disk.save(conversation, self.fingerprint(kept.precision), kept.kv)

    def save_copy(self, conversation: str, disk: DiskTier) -> None:
        """Saves the whole cache on another disk too, in the place of what is there of it; waits for that.

        Raises:
            KvchatError: it can't be saved.
        """
        failures: list[str] = []
        disk.on_saved = lambda result: failures.append(result.error) if result.error else None
        disk.remove(conversation)
        kept = self._kept.get(conversation)
        if kept is None or not kept.kv or kept.prefix_only:
            return
        copy = kept.kv.fork(len(kept.kv.ids))
        copy.saved_rows = 0
        if not disk.save_now(conversation, self.fingerprint(kept.precision), copy):
            raise KvchatError(f"The cache can't be saved: {' '.join(failures)}")

    def pin(self, conversation: str, *, pinned: bool) -> None:
        """Keeps a cache in memory longer than the others."""
        (self._pinned.add if pinned else self._pinned.discard)(conversation)

    def state(self, events: Sequence[CacheEvent] = ()) -> PoolState:
        """Everything, for the screen; the next to go first among those in memory."""
        going = [held.conversation for held in eviction_order(self._held())]
        shelved = self._disk.sizes() if self._disk else {}
        hot = [
            self._hot(name, kept, shelved.get(name, 0), going) for name, kept in self._kept.items() if kept.kv
        ]
        names = {each.conversation for each in hot}
        cold = [WarmCache(name, 0, 0, disk_bytes=size) for name, size in shelved.items() if name not in names]
        return PoolState(
            (*hot, *cold),
            self.used_bytes,
            self.budget_bytes,
            sum(shelved.values()),
            self._disk.cap_bytes if self._disk else 0,
            tuple(events),
            int(psutil.virtual_memory().available),
            self.draft_bytes,
        )

    def _hot(self, name: str, kept: ResidentCache, disk_bytes: int, going: Sequence[str]) -> WarmCache:
        return WarmCache(
            name,
            len(kept.kv),
            kept.kv.storage_bytes,
            disk_bytes,
            kept.precision.value,
            pinned=name in self._pinned,
            next_evicted=going[:1] == [name],
            last_used=kept.last_used,
        )

    def close(self) -> None:
        """Saves what is not saved, and frees everything."""
        for name in self._kept:
            self.save(name)
        if self._disk:
            self._disk.close()
        self._kept.clear()

    def log_fork(self, parent: str, child: str, tokens: int) -> None:
        """A fork shares memory: no bytes yet."""
        self._event_log.log(child, CacheEventKind.FORK, tokens, note=f"shares the memory of {parent}")
