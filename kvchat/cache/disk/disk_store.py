"""The saved caches on disk: a folder for each conversation, with a chain of segments in it.

Segment n of a conversation is `ROOT/CONVERSATION/00000n.safetensors`. A segment replaces everything from its
`start` and `first` on, as `unpack_rows` does, so it supersedes earlier segments that start no earlier.

Must not import torch: listing saved caches has to be quick.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kvchat.cache.disk.segment import Header, Segment, SnapshotRefused, read_segment, refusal, segment_number
from kvchat.errors import KvchatError, as_sentence, cause
from kvchat.system.ownership import make_private

LOCK_S = 20.0
"""Seconds to wait for another process that writes to the same store; writing 100 MB takes about 0.1 s."""
TRIES = 3
"""Attempts to read a chain that another process is changing."""

CONVERSATION_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")
SEGMENT_NAME = re.compile(r"[0-9]{6,9}\.safetensors")
TEMP_SUFFIX = ".tmp"
REMOVED_PREFIX = ".removed-"
LOCK_NAME = ".lock"


class NoRoomError(KvchatError):
    """The bytes to write don't fit under the cap, even with every other cache removed."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The headers of one conversation's saved cache; without segments, nothing is saved."""

    folder: Path
    segments: tuple[Segment, ...]
    """Those that no later one supersedes; `start` ascends."""
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def conversation(self) -> str:
        return self.folder.name

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return self.segments[-1].header.fingerprint if self.segments else {}

    @property
    def checksum(self) -> str:
        """Of the last header, which covers all earlier ones; empty without segments."""
        return self.segments[-1].checksum if self.segments else ""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, including rows that a later segment replaces."""
        return sum(segment.header.tensor_bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing."""

    conversation: str
    bytes: int
    """Of everything in the folder."""
    tokens: int
    """Rows that a load restores."""
    last_used: float
    """Seconds since the epoch."""
    fingerprint: Mapping[str, str]
    damage: str = ""
    """Why the cache can't be used; empty where it can."""


def unsuperseded(segments: Iterable[Segment], start: int, first: int) -> list[Segment]:
    """The segments of a chain that are still needed once rows from `start` on are replaced.

    A checkpoint at `first` itself is still needed, even where no row is.
    """
    needed = list(segments)
    while needed and _superseded(needed[-1].header, start, first):
        needed.pop()
    return needed


def _superseded(header: Header, start: int, first: int) -> bool:
    return (
        header.start >= start
        and header.first >= first
        and all(checkpoint > first for checkpoint in header.checkpoints)
    )


def read_chain(folder: Path) -> Chain:
    """Reads the headers of the chain in `folder`, which is named after the conversation.

    Raises:
        SnapshotRefused: a segment is damaged, or doesn't continue the one before it.
    """
    for _ in range(TRIES):
        with contextlib.suppress(FileNotFoundError):
            return _chain_of(folder, [read_segment(path) for path in segment_files(folder)])
    raise SnapshotRefused(f"The saved cache {folder.name} can't be used: another process keeps changing it.")


def segment_files(folder: Path) -> list[Path]:
    """The segments in a folder, oldest first; empty where there is no folder."""
    segments = [folder / name for name in _names(folder) if SEGMENT_NAME.fullmatch(name)]
    return sorted(segments, key=segment_number)


def _chain_of(folder: Path, segments: Iterable[Segment]) -> Chain:
    needed: list[Segment] = []
    for segment in segments:
        needed = [*unsuperseded(needed, segment.header.start, segment.header.first), segment]
    ids: list[int] = []
    rows: list[int] = []
    positions: list[int] = []
    before = None
    for segment in needed:
        header = segment.header
        _check_continues(segment, before, len(ids), rows)
        ids[header.first :] = header.ids
        rows[header.start :] = header.rows
        positions[header.start :] = header.positions
        before = segment
    return Chain(folder, tuple(needed), tuple(ids), tuple(rows), tuple(positions))


def _check_continues(segment: Segment, before: Segment | None, tokens: int, rows: Sequence[int]) -> None:
    header = segment.header
    if header.parent != (before.checksum if before else ""):
        raise refusal(segment.path, f"doesn't continue {before.path.name if before else 'an empty cache'}")
    if before and header.fingerprint != before.header.fingerprint:
        raise refusal(segment.path, "was made by another model or with other settings than the one before it")
    last = rows[header.start - 1] if 0 < header.start <= len(rows) else -1
    if header.first > tokens or header.start > len(rows) or last >= header.first:
        raise refusal(
            segment.path, f"starts at token {header.first} and row {header.start} after {tokens} tokens"
        )


def _names(folder: Path) -> list[str]:
    """The names in a folder; empty where there is no folder."""
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _bytes_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


class DiskStore:
    """The folders of all conversations under one cap of bytes.

    Other processes may use the same root: writers hold `locked`, and readers expect files to disappear.
    """

    def __init__(self, root: Path, cap_bytes: int) -> None:
        self.root = root
        self.cap_bytes = cap_bytes
        self._lock = FileLock(root / LOCK_NAME, timeout=LOCK_S, mode=0o600)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time among threads and processes; may be nested.

        Raises:
            KvchatError: another process holds the lock for longer than `LOCK_S`, or the root isn't writable.
        """
        try:
            make_private(self.root)
            self._lock.acquire()
        except Timeout as error:
            raise KvchatError(
                f"Another kvchat has been writing to {self.root} for {LOCK_S:.0f} s."
            ) from error
        except OSError as error:
            raise KvchatError(f"The saved caches can't be changed: {cause(error)}.") from error
        try:
            yield
        finally:
            self._lock.release()

    def folder(self, conversation: str) -> Path:
        """The folder of a conversation's segments; it need not exist.

        Raises:
            KvchatError: the id could point outside the root.
        """
        if not CONVERSATION_ID.fullmatch(conversation):
            raise KvchatError(f"{conversation!r} can't be the name of a folder for a cache.")
        return self.root / conversation

    def chain(self, conversation: str) -> Chain:
        """`read_chain` of a conversation."""
        return read_chain(self.folder(conversation))

    def conversations(self) -> list[str]:
        """The ids of all saved caches, damaged ones included."""
        names = (name for name in _names(self.root) if CONVERSATION_ID.fullmatch(name))
        return sorted(name for name in names if (self.root / name).is_dir())

    def disk_bytes(self, conversation: str) -> int:
        """Bytes of a conversation's folder; 0 where it can't be read."""
        folder = self.folder(conversation)
        with contextlib.suppress(PermissionError):
            return sum(_bytes_of(folder / name) for name in _names(folder))
        return 0

    def total_bytes(self) -> int:
        """Bytes of all saved caches, which the cap limits."""
        return sum(map(self.disk_bytes, self.conversations()))

    def entries(self) -> list[Entry]:
        """Every conversation, the most recently used first; a damaged one says why."""
        entries = [entry for name in self.conversations() if (entry := self._entry(name))]
        return sorted(entries, key=lambda entry: entry.last_used, reverse=True)

    def _entry(self, conversation: str) -> Entry | None:
        last_used = self._last_used(conversation)
        if last_used is None:
            return None
        size = self.disk_bytes(conversation)
        try:
            chain = self.chain(conversation)
        except (SnapshotRefused, OSError) as error:
            return Entry(conversation, size, 0, last_used, {}, as_sentence(error))
        damage = "" if chain.segments else "There is no segment in it."
        return Entry(conversation, size, len(chain.rows), last_used, chain.fingerprint, damage)

    def _last_used(self, conversation: str) -> float | None:
        """A folder's modification time, which saves and `touch` update; None where there is no folder."""
        try:
            return self.folder(conversation).stat().st_mtime_ns / 1e9
        except FileNotFoundError:
            return None

    def touch(self, conversation: str) -> None:
        """Marks a conversation as just used."""
        now = time.time_ns()
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folder(conversation), ns=(now, now))

    def remove(self, conversation: str) -> int:
        """Removes a conversation's saved cache atomically; returns its bytes, 0 where there is none."""
        folder = self.folder(conversation)
        with self.locked():
            size = self.disk_bytes(conversation)
            removed = self.root / f"{REMOVED_PREFIX}{conversation}"
            shutil.rmtree(removed, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                folder.rename(removed)
                shutil.rmtree(removed)
        return size

    def gc(self, known: Collection[str]) -> int:
        """Removes caches of unknown conversations and leftovers of killed processes; returns bytes."""
        with self.locked():
            freed = sum(self.remove(name) for name in self.conversations() if name not in known)
            freed += sum(self.clean(name) for name in self.conversations())
            for name in _names(self.root):
                if name.startswith(REMOVED_PREFIX):
                    freed += sum(_bytes_of(self.root / name / inside) for inside in _names(self.root / name))
                    shutil.rmtree(self.root / name, ignore_errors=True)
        return freed

    def clean(self, conversation: str) -> int:
        """Removes temporary files of killed writers, under the lock; returns bytes."""
        folder = self.folder(conversation)
        with self.locked():
            stale = [folder / name for name in _names(folder) if name.endswith(TEMP_SUFFIX)]
            freed = sum(map(_bytes_of, stale))
            for path in stale:
                path.unlink(missing_ok=True)
        return freed

    def make_room(self, more_bytes: int, protect: str) -> list[str]:
        """Removes whole conversations, least recently used first, until `more_bytes` fit under the cap.

        Returns their ids. Hold `locked` from here until the bytes are written.

        Raises:
            NoRoomError: they don't fit even with only `protect` left; nothing was removed.
        """
        with self.locked():
            sizes = {name: self.disk_bytes(name) for name in self.conversations()}
            needed = sizes.pop(protect, 0) + more_bytes
            if needed > self.cap_bytes:
                raise NoRoomError(
                    f"The cache of conversation {protect} would take {needed / 1e6:,.1f} MB on disk, "
                    f"and all of them may take {self.cap_bytes / 1e6:,.1f} MB."
                )
            removed = []
            for name in sorted(sizes, key=lambda name: (self._last_used(name) or 0.0, name)):
                if needed + sum(sizes.values()) <= self.cap_bytes:
                    break
                self.remove(name)
                del sizes[name]
                removed.append(name)
        return removed
