"""What lies on disk: a folder for each conversation, and in it a chain of segments.

Segment n of a conversation is `ROOT/CONVERSATION/00000n.safetensors`. The chain is read as
`ConversationKV.unpack` reads it: a segment keeps what comes before its `start` and `first` and puts its own
after that, so that it supersedes those that start no earlier.

It knows paths, chains, bytes and who was used last. It refuses to know tensors: a listing imports no torch.
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
"""Seconds to wait for another process that writes to the same shelf; 100 MB take it about 0.1 s."""
TRIES = 3
"""Times a chain is looked up again when another process changes it meanwhile."""

CONVERSATION_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")
SEGMENT_NAME = re.compile(r"[0-9]{6,9}\.safetensors")
TEMP_SUFFIX = ".tmp"
REMOVED_PREFIX = ".removed-"
LOCK_NAME = ".lock"


class NoRoomError(KvchatError):
    """What is to be written doesn't fit under the cap, whatever else is removed."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The saved cache of one conversation, as its headers tell it; without segments, nothing is saved."""

    folder: Path
    segments: tuple[Segment, ...]
    """Those that nothing supersedes; `start` ascends."""
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
        """Of the last header, and so of everything; empty without segments."""
        return self.segments[-1].checksum if self.segments else ""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, rows included that a later segment drops."""
        return sum(segment.header.tensor_bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing."""

    conversation: str
    bytes: int
    """On disk, with everything that lies in the folder."""
    tokens: int
    """Rows that a load would bring back."""
    last_used: float
    """Seconds since the epoch."""
    fingerprint: Mapping[str, str]
    damage: str = ""
    """Why the cache can't be used; empty where it can."""


def unsuperseded(segments: Iterable[Segment], start: int, first: int) -> list[Segment]:
    """The segments of a chain of which something is left when rows from `start` on come after them.

    A mark at `first` itself is left, even where no row is.
    """
    kept = list(segments)
    while kept and _superseded(kept[-1].header, start, first):
        kept.pop()
    return kept


def _superseded(header: Header, start: int, first: int) -> bool:
    return (
        header.start >= start
        and header.first >= first
        and all(checkpoint > first for checkpoint in header.checkpoints)
    )


def read_chain(folder: Path) -> Chain:
    """The chain of the conversation whose name `folder` has, out of headers alone.

    Raises:
        SnapshotRefused: a segment isn't what it should be, or doesn't continue the one before it.
    """
    for _ in range(TRIES):
        with contextlib.suppress(FileNotFoundError):
            return _chain_of(folder, [read_segment(path) for path in segment_files(folder)])
    raise SnapshotRefused(f"The saved cache {folder.name} can't be used: another process keeps changing it.")


def segment_files(folder: Path) -> list[Path]:
    """The segments in a folder, oldest first; none where there is no folder."""
    segments = [folder / name for name in _names(folder) if SEGMENT_NAME.fullmatch(name)]
    return sorted(segments, key=segment_number)


def _chain_of(folder: Path, segments: Iterable[Segment]) -> Chain:
    alive: list[Segment] = []
    for segment in segments:
        alive = [*unsuperseded(alive, segment.header.start, segment.header.first), segment]
    ids: list[int] = []
    rows: list[int] = []
    positions: list[int] = []
    before = None
    for segment in alive:
        header = segment.header
        _check_continues(segment, before, len(ids), rows)
        ids[header.first :] = header.ids
        rows[header.start :] = header.rows
        positions[header.start :] = header.positions
        before = segment
    return Chain(folder, tuple(alive), tuple(ids), tuple(rows), tuple(positions))


def _check_continues(segment: Segment, before: Segment | None, tokens: int, rows: Sequence[int]) -> None:
    header = segment.header
    if header.parent != (before.checksum if before else ""):
        raise refusal(segment.path, f"doesn't continue {before.path.name if before else 'an empty cache'}")
    if before and header.fingerprint != before.header.fingerprint:
        raise refusal(segment.path, "was made by another model or in another way than the one before it")
    last = rows[header.start - 1] if 0 < header.start <= len(rows) else -1
    if header.first > tokens or header.start > len(rows) or last >= header.first:
        raise refusal(
            segment.path, f"starts at token {header.first} and row {header.start} after {tokens} tokens"
        )


def _names(folder: Path) -> list[str]:
    """What lies in a folder; nothing where it is gone."""
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

    Other processes may use the same root: who changes something holds `locked`, and readers expect that files
    vanish.
    """

    def __init__(self, root: Path, cap_bytes: int) -> None:
        self.root = root
        self.cap_bytes = cap_bytes
        self._lock = FileLock(root / LOCK_NAME, timeout=LOCK_S, mode=0o600)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time among threads and processes; may be nested.

        Raises:
            KvchatError: another process holds the shelf for longer than `LOCK_S`, or it can't be written to.
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
        """Where a conversation's segments lie; the folder need not exist.

        Raises:
            KvchatError: the id could name another place.
        """
        if not CONVERSATION_ID.fullmatch(conversation):
            raise KvchatError(f"{conversation!r} can't be the name of a folder for a cache.")
        return self.root / conversation

    def chain(self, conversation: str) -> Chain:
        """`read_chain` of a conversation."""
        return read_chain(self.folder(conversation))

    def conversations(self) -> list[str]:
        """The ids of everything on the shelf, damaged or not."""
        names = (name for name in _names(self.root) if CONVERSATION_ID.fullmatch(name))
        return sorted(name for name in names if (self.root / name).is_dir())

    def disk_bytes(self, conversation: str) -> int:
        """Bytes that a conversation's folder costs; 0 where it can't be looked into."""
        folder = self.folder(conversation)
        with contextlib.suppress(PermissionError):
            return sum(_bytes_of(folder / name) for name in _names(folder))
        return 0

    def total_bytes(self) -> int:
        """Bytes of everything on the shelf: what the cap bounds."""
        return sum(map(self.disk_bytes, self.conversations()))

    def entries(self) -> list[Entry]:
        """Every conversation, the one used last first; a damaged one says why."""
        entries = [entry for name in self.conversations() if (entry := self._entry(name))]
        return sorted(entries, key=lambda entry: entry.last_used, reverse=True)

    def _entry(self, conversation: str) -> Entry | None:
        last_used = self._last_used(conversation)
        if last_used is None:
            return None
        held = self.disk_bytes(conversation)
        try:
            chain = self.chain(conversation)
        except (SnapshotRefused, OSError) as error:
            return Entry(conversation, held, 0, last_used, {}, as_sentence(error))
        damage = "" if chain.segments else "There is no segment in it."
        return Entry(conversation, held, len(chain.rows), last_used, chain.fingerprint, damage)

    def _last_used(self, conversation: str) -> float | None:
        """A folder's time of change: a save changes it, `touch` sets it. None where it is gone."""
        try:
            return self.folder(conversation).stat().st_mtime_ns / 1e9
        except FileNotFoundError:
            return None

    def touch(self, conversation: str) -> None:
        """Notes that a conversation was used just now."""
        now = time.time_ns()
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folder(conversation), ns=(now, now))

    def remove(self, conversation: str) -> int:
        """Takes a conversation off the shelf, all at once; returns bytes: 0 where there is none."""
        folder = self.folder(conversation)
        with self.locked():
            held = self.disk_bytes(conversation)
            gone = self.root / f"{REMOVED_PREFIX}{conversation}"
            shutil.rmtree(gone, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                folder.rename(gone)
                shutil.rmtree(gone)
        return held

    def gc(self, known: Collection[str]) -> int:
        """Removes what belongs to no known conversation and what a killed process left; returns bytes."""
        with self.locked():
            freed = sum(self.remove(name) for name in self.conversations() if name not in known)
            freed += sum(self.clean(name) for name in self.conversations())
            for name in _names(self.root):
                if name.startswith(REMOVED_PREFIX):
                    freed += sum(_bytes_of(self.root / name / inside) for inside in _names(self.root / name))
                    shutil.rmtree(self.root / name, ignore_errors=True)
        return freed

    def clean(self, conversation: str) -> int:
        """Removes half-written files; returns bytes. Nobody writes them now: writers hold the lock."""
        folder = self.folder(conversation)
        with self.locked():
            stale = [folder / name for name in _names(folder) if name.endswith(TEMP_SUFFIX)]
            freed = sum(map(_bytes_of, stale))
            for path in stale:
                path.unlink(missing_ok=True)
        return freed

    def make_room(self, more_bytes: int, protect: str) -> list[str]:
        """Removes whole conversations, the one used longest ago first, until `more_bytes` fit under the cap.

        Returns which. Hold `locked` from here until the bytes are written.

        Raises:
            NoRoomError: they don't fit even beside `protect` alone; nothing was removed.
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
