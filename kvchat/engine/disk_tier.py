"""The saved caches as the engine uses them: find, restore, save, remove."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvchat.cache.disk.disk_store import Chain, DiskStore
from kvchat.cache.disk.segment import SnapshotRefused
from kvchat.cache.disk.snapshot import load
from kvchat.cache.disk.writer import DiskWriter, SaveResult
from kvchat.cache.fingerprint import Fingerprint
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.packed_rows import pack_rows
from kvchat.cache.prefix import gap_bounds, reusable_prefix
from kvchat.errors import KvchatError, translating

OnSaved = Callable[[SaveResult], None]


@dataclass(frozen=True, slots=True)
class SavedCache:
    """A conversation's cache on disk, of which only the headers are read."""

    chain: Chain

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The fingerprint of the model that made it."""
        return self.chain.fingerprint

    @property
    def rows(self) -> int:
        """Rows it restores."""
        return len(self.chain.rows)

    @property
    def most_rows(self) -> int:
        """Peak rows during a restore: a later segment may replace rows of an earlier one."""
        return max((s.header.start + len(s.header.rows) for s in self.chain.segments), default=0)

    def reusable(self, prompt: Sequence[int], *, gaps: bool) -> int:
        """Tokens of the prompt that it stores and can return to; leaves at least one to read."""
        same = reusable_prefix(self.chain.ids, prompt)
        first, end = gap_bounds(self.chain.rows, len(self.chain.ids))
        if same <= end or not gaps:
            same = min(same, first)
        checkpoints = [m for segment in self.chain.segments for m in segment.header.checkpoints]
        return max((m for m in checkpoints if m <= same), default=0) if checkpoints else same


class DiskTier:
    """Saves in a thread; everything else is synchronous."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self.on_saved: OnSaved = lambda _result: None
        """Called from the writer's thread."""
        self._unsaved: set[str] = set()
        """Conversations without a saved cache that can be continued: the next save starts at row 0."""
        self._refused: dict[str, str] = {}
        """Conversation → why its saved cache, which can't be removed, is ignored."""
        self._writer = DiskWriter(store, self._note)

    def _note(self, result: SaveResult) -> None:
        self._unsaved.update(result.removed)
        if result.error:
            self._unsaved.add(result.conversation)
        self.on_saved(result)

    @property
    def cap_bytes(self) -> int:
        """Bytes that all saved caches may take."""
        return self._store.cap_bytes

    def find(self, conversation: str) -> SavedCache | None:
        """A conversation's saved cache, if there is one.

        Raises:
            SnapshotRefused: there is one, and it can't be used.
        """
        self._writer.wait(conversation)
        if why := self._refused.get(conversation):
            raise SnapshotRefused(why)
        with translating(f"The saved cache {conversation} can't be used", SnapshotRefused):
            chain = self._store.chain(conversation)
        return SavedCache(chain) if chain.segments else None

    def restore(self, saved: SavedCache, kv: ConversationKV, fingerprint: Fingerprint) -> None:
        """Loads a saved cache into an empty one.

        Raises:
            SnapshotRefused: the saved cache is damaged, or of another model; the empty one stays empty.
        """
        conversation = saved.chain.conversation
        with translating(f"The saved cache {conversation} can't be used", SnapshotRefused):
            load(saved.chain, kv, fingerprint.as_dict())
        self._writer.adopt(saved.chain)
        with suppress(OSError):  # a folder of another user: only its time of use stays old
            self._store.touch(conversation)

    def save(self, conversation: str, fingerprint: Fingerprint, kv: ConversationKV) -> None:
        """Queues the rows that are not saved yet; returns at once."""
        if conversation in self._unsaved:
            self._unsaved.discard(conversation)
            kv.saved_rows = 0
        if kv.saved_rows < len(kv):
            self._writer.submit(conversation, fingerprint.as_dict(), pack_rows(kv))

    def save_now(self, conversation: str, fingerprint: Fingerprint, kv: ConversationKV) -> bool:
        """Saves and waits; False where it failed."""
        self.save(conversation, fingerprint, kv)
        self._writer.wait(conversation)
        return conversation not in self._unsaved

    def remove(self, conversation: str) -> None:
        """Deletes a conversation's saved cache.

        Raises:
            KvchatError: it can't be removed.
        """
        self._writer.forget(conversation)

    def refuse(self, conversation: str, why: str) -> None:
        """Removes a saved cache that can't be used; where that fails, ignores it until the next start."""
        try:
            self.remove(conversation)
        except KvchatError:
            self._refused[conversation] = why

    def sizes(self) -> dict[str, int]:
        """Conversation → bytes on disk."""
        with suppress(OSError):
            return {name: self._store.disk_bytes(name) for name in self._store.conversations()}
        return {}

    def close(self) -> None:
        """Writes everything that is queued."""
        self._writer.close()
