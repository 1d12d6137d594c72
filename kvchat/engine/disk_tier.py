"""The caches on disk, as the engine uses them: find, restore, save, remove."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvchat.cache.disk.disk_store import Chain, DiskStore
from kvchat.cache.disk.segment import SnapshotRefused
from kvchat.cache.disk.snapshot import load
from kvchat.cache.disk.writer import DiskWriter, SaveResult
from kvchat.cache.fingerprint import Fingerprint
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.prefix import gap_bounds, reusable_prefix
from kvchat.errors import KvchatError, translating

OnSaved = Callable[[SaveResult], None]


@dataclass(frozen=True, slots=True)
class SavedCache:
    """A conversation's cache on disk, as its headers tell it."""

    chain: Chain

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What it was made by."""
        return self.chain.fingerprint

    @property
    def rows(self) -> int:
        """Tokens it holds."""
        return len(self.chain.rows)

    @property
    def most_rows(self) -> int:
        """Tokens held at the worst moment of a restore: a later segment may drop those of one before."""
        return max((s.header.start + len(s.header.rows) for s in self.chain.segments), default=0)

    def reusable(self, prompt: Sequence[int], *, gaps: bool) -> int:
        """Tokens of the prompt that it holds and can go back to; at least one is left to read."""
        same = reusable_prefix(self.chain.ids, prompt)
        first, end = gap_bounds(self.chain.rows, len(self.chain.ids))
        if same <= end or not gaps:
            same = min(same, first)
        checkpoints = [m for segment in self.chain.segments for m in segment.header.checkpoints]
        return max((m for m in checkpoints if m <= same), default=0) if checkpoints else same


class DiskTier:
    """Saves in a thread of its own; everything else is asked and answered at once."""

    def __init__(self, shelf: DiskStore) -> None:
        self._shelf = shelf
        self.on_saved: OnSaved = lambda _result: None
        """Called from the saving thread."""
        self._unsaved: set[str] = set()
        """Conversations of which nothing on disk can be continued: the next save starts over."""
        self._refused: dict[str, str] = {}
        """Conversation → why what is saved of it, which can't be removed, is not looked at again."""
        self._saver = DiskWriter(shelf, self._note)

    def _note(self, result: SaveResult) -> None:
        self._unsaved.update(result.removed)
        if result.error:
            self._unsaved.add(result.conversation)
        self.on_saved(result)

    @property
    def cap_bytes(self) -> int:
        """What all saved caches may take."""
        return self._shelf.cap_bytes

    def find(self, conversation: str) -> SavedCache | None:
        """What is saved of a conversation.

        Raises:
            SnapshotRefused: something is, and it can't be used.
        """
        self._saver.wait(conversation)
        if why := self._refused.get(conversation):
            raise SnapshotRefused(why)
        with translating(f"The saved cache {conversation} can't be used", SnapshotRefused):
            chain = self._shelf.chain(conversation)
        return SavedCache(chain) if chain.segments else None

    def restore(self, saved: SavedCache, kv: ConversationKV, fingerprint: Fingerprint) -> None:
        """Fills an empty cache.

        Raises:
            SnapshotRefused: the saved cache is damaged, or another model's; the empty one stays empty.
        """
        conversation = saved.chain.conversation
        with translating(f"The saved cache {conversation} can't be used", SnapshotRefused):
            load(saved.chain, kv, fingerprint.as_dict())
        self._saver.adopt(saved.chain)
        with suppress(OSError):  # a folder of another user: it only counts as used longer ago
            self._shelf.touch(conversation)

    def save(self, conversation: str, fingerprint: Fingerprint, kv: ConversationKV) -> None:
        """Sends the rows that are not saved yet; returns at once."""
        if conversation in self._unsaved:
            self._unsaved.discard(conversation)
            kv.saved_rows = 0
        if kv.saved_rows < len(kv):
            self._saver.submit(conversation, fingerprint.as_dict(), kv.pack())

    def save_now(self, conversation: str, fingerprint: Fingerprint, kv: ConversationKV) -> bool:
        """Saves and waits; False where it failed."""
        self.save(conversation, fingerprint, kv)
        self._saver.wait(conversation)
        return conversation not in self._unsaved

    def remove(self, conversation: str) -> None:
        """Deletes what is saved of a conversation.

        Raises:
            KvchatError: it can't be removed.
        """
        self._saver.forget(conversation)

    def refuse(self, conversation: str, why: str) -> None:
        """Removes what can't be used; where that fails, it is not looked at again before the next start."""
        try:
            self.remove(conversation)
        except KvchatError:
            self._refused[conversation] = why

    def sizes(self) -> dict[str, int]:
        """Conversation → bytes on disk."""
        with suppress(OSError):
            return {name: self._shelf.disk_bytes(name) for name in self._shelf.conversations()}
        return {}

    def close(self) -> None:
        """Writes what waits to be written."""
        self._saver.close()
