"""What lies on disk: a folder for each conversation, and in it a chain of segment files.

A segment is one safetensors file (https://github.com/huggingface/safetensors#format) with the rows that were
new after one turn. Segment n of a conversation is `ROOT/CONVERSATION/00000n.safetensors`:

    8 bytes        length of the header, little endian
    header, JSON   {"__metadata__": {"checksum": HEX, "segment": JSON}, "0.keys": {dtype, shape, …}, …}
    the tensors    one after the other, without gaps

The chain is read as `ConversationKV.unpack` reads it: a segment keeps what comes before its `start` and
`first` and puts its own after that, so that it supersedes those that start no earlier. Each one names the
checksum of the one it continues, and that checksum covers ids, rows, positions, the checksum of every tensor
and, in turn, everything before: parts of two histories can't be taken for one.

It knows paths, headers, bytes and who was used last. It refuses to know tensors: a listing imports no torch.
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from xxhash import xxh3_128_hexdigest

from kvchat.errors import KvchatError

FORMAT = 1
MAX_HEADER_BYTES = 16_000_000
"""128,000 ids and the tensors of 100 layers are 1 MB."""
LOCK_S = 20.0
"""Seconds to wait for another process that writes to the same shelf; 100 MB take it about 0.1 s."""
TRIES = 3
"""Times a chain is looked up again when another process changes it meanwhile."""

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""safetensors' names of the number types → bytes of one number."""

CONVERSATION_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")
SEGMENT_NAME = re.compile(r"[0-9]{6,9}\.safetensors")
TEMP_SUFFIX = ".tmp"
REMOVED_PREFIX = ".removed-"
LOCK_NAME = ".lock"

CHECKSUM_DIGITS = 32
OPENING = b'{"__metadata__":{"checksum":"'
"""How every header begins: the checksum lies at a fixed place, and is of every other byte of the header."""


class SnapshotRefused(KvchatError):  # noqa: N818
    """A saved cache can't be used; the sentence says what is wrong and where. The text still opens."""


class NoRoomError(KvchatError):
    """What is to be written doesn't fit under the cap, whatever else is removed."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a segment: bytes `begin` to `end` after the header."""

    name: str
    """`LAYER.NAME`, or `mark.LENGTH.INDEX.NAME` for part of a recurrent state."""
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    checksum: str
    """xxh3-128 of those bytes."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment says about itself; `kv.PackedRows` without the tensors."""

    conversation: str
    fingerprint: Mapping[str, str]
    parent: str
    """The checksum of the segment that this one continues; empty where it begins the cache."""
    start: int
    first: int
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    marks: Mapping[int, int]
    """History length → number of recurrent states kept there."""
    tensors: tuple[TensorEntry, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes after the header."""
        return self.tensors[-1].end if self.tensors else 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A file whose header was read and is what it should be; its tensors were not looked at."""

    path: Path
    checksum: str
    """xxh3-128 of the header."""
    data_start: int
    """Byte of the file at which the tensors begin."""
    header: Header


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


def refusal(path: Path, what: str) -> SnapshotRefused:
    """The sentence for a file that can't be used; `what` continues its name."""
    where = f"{path.parent.name}/{path.name}"
    return SnapshotRefused(f"The saved cache {where} can't be used: it {what}.")


def segment_path(folder: Path, number: int) -> Path:
    """Where segment `number` lies."""
    return folder / f"{number:06d}.safetensors"


def segment_number(path: Path) -> int:
    """The number in a segment's name."""
    return int(path.stem)


def encode_header(header: Header) -> bytes:
    """The bytes before the tensors, length included; a multiple of 8, as safetensors has it."""
    segment = {
        "format": FORMAT,
        "conversation": header.conversation,
        "fingerprint": dict(header.fingerprint),
        "parent": header.parent,
        "start": header.start,
        "first": header.first,
        "ids": header.ids,
        "rows": runs(header.rows),
        "positions": runs(header.positions),
        "marks": list(header.marks.items()),
        "checksums": {entry.name: entry.checksum for entry in header.tensors},
    }
    table = {
        entry.name: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
        for entry in header.tensors
    }
    metadata = {"checksum": "0" * CHECKSUM_DIGITS, "segment": _compact(segment)}
    text = _compact({"__metadata__": metadata} | table).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    place = _checksum_place()
    return raw[: place.start] + header_checksum(raw).encode() + raw[place.stop :]


def header_checksum(raw: bytes) -> str:
    """xxh3-128 of an encoded header without the checksum in it."""
    place = _checksum_place()
    return xxh3_128_hexdigest(raw[: place.start] + raw[place.stop :])


def _checksum_place() -> slice:
    begin = 8 + len(OPENING)
    return slice(begin, begin + CHECKSUM_DIGITS)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of every run of consecutive numbers: `5 6 7 20` is `(5, 3) (20, 1)`."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1] + 1]
    return [(values[i], j - i) for i, j in pairwise([*starts, len(values)])]


def _expanded(value: object, limit: int) -> tuple[int, ...]:
    """What `runs` was made from.

    Raises:
        ValueError: these aren't runs, or more than `limit` numbers: a short run can claim a huge range.
    """
    pairs = [_integers(run) for run in _list(value)]
    if any(len(pair) != 2 for pair in pairs) or sum(count for _, count in pairs) > limit:
        raise ValueError("runs of numbers that can't be")
    return tuple(number for begin, count in pairs for number in range(begin, begin + count))


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{type(value).__name__} instead of a list")
    return value


def _mapping(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of an object")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} instead of text")
    return value


def _integers(value: object) -> tuple[int, ...]:
    numbers = _list(value)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("something that is no count")
    return tuple(number for number in numbers if isinstance(number, int))


def read_segment(path: Path) -> Segment:
    """Reads the header of one file, and nothing else.

    Raises:
        SnapshotRefused: it isn't a segment of the conversation whose name the folder has, or was changed.
        FileNotFoundError: it is gone.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = _read_header(file, size)
        header = _parse(raw)
        if header.conversation != path.parent.name:
            raise ValueError(f"belongs to conversation {header.conversation}")
        if header.tensor_bytes != size - len(raw):
            raise ValueError(f"has {size - len(raw):,} bytes of tensors instead of {header.tensor_bytes:,}")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise refusal(path, f"can't be read ({error.strerror})") from error
    except ValueError as error:
        raise refusal(path, str(error)) from error
    place = _checksum_place()
    return Segment(path, raw[place].decode(), len(raw), header)


def _read_header(file: BinaryIO, size: int) -> bytes:
    """Length and header of a file of `size` bytes, once the checksum says that they are as written."""
    length = file.read(8)
    claimed = int.from_bytes(length, "little")
    if len(length) < 8 or claimed > size - 8:
        raise ValueError(f"is cut short or garbage ({size:,} bytes)")
    if claimed > MAX_HEADER_BYTES:
        raise ValueError(f"claims a header of {claimed:,} bytes")
    raw = length + file.read(claimed)
    if not raw.startswith(OPENING, 8):
        raise ValueError("has no header that kvchat wrote")
    if raw[_checksum_place()] != header_checksum(raw).encode():
        raise ValueError("has a damaged header")
    return raw


def _parse(raw: bytes) -> Header:
    """A header out of its bytes; ValueError continues the sentence "it …"."""
    try:
        table = _mapping(json.loads(raw[8:]))
        segment = _mapping(json.loads(_text(_mapping(table.pop("__metadata__"))["segment"])))
        if segment["format"] != FORMAT:
            raise NotImplementedError
        header = _header_of(segment, table)
    except NotImplementedError:
        raise ValueError(f"has format {segment['format']}, and this kvchat reads {FORMAT}") from None
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"has a header that makes no sense ({error})") from error
    return header


def _header_of(segment: Mapping[str, object], table: Mapping[str, object]) -> Header:
    start, first = _integers([segment["start"], segment["first"]])
    ids = _integers(segment["ids"])
    rows = _expanded(segment["rows"], len(ids))
    positions = _expanded(segment["positions"], len(rows))
    marks = dict(_pair(mark) for mark in _list(segment["marks"]))
    parent = _text(segment["parent"])
    end = first + len(ids)
    if len(positions) != len(rows) or any(a >= b for a, b in pairwise((first - 1, *rows, end))):
        raise ValueError("rows that are no rows of its tokens")
    if any(not first <= mark <= end for mark in marks):
        raise ValueError("marks outside its tokens")
    if bool(start) != bool(parent) or (first and not start):
        raise ValueError("a beginning that continues something")
    checksums = _mapping(segment["checksums"])
    fingerprint = {name: _text(value) for name, value in _mapping(segment["fingerprint"]).items()}
    tensors = _tensors_of(table, checksums)
    conversation = _text(segment["conversation"])
    return Header(conversation, fingerprint, parent, start, first, ids, rows, positions, marks, tensors)


def _pair(value: object) -> tuple[int, int]:
    first, second = _integers(value)
    return first, second


def _tensors_of(table: Mapping[str, object], checksums: Mapping[str, object]) -> tuple[TensorEntry, ...]:
    """The tensors in the order they lie in, without a gap or an overlap."""
    if table.keys() != checksums.keys():
        raise ValueError("checksums of other tensors")
    entries = [_entry_of(name, _mapping(table[name]), _text(checksums[name])) for name in table]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    if any(a.end != b.begin for a, b in pairwise(entries)) or (entries and entries[0].begin != 0):
        raise ValueError("tensors that overlap or leave a gap")
    return tuple(entries)


def _entry_of(name: str, said: Mapping[str, object], checksum: str) -> TensorEntry:
    dtype, shape = _text(said["dtype"]), _integers(said["shape"])
    begin, end = _pair(said["data_offsets"])
    item = ITEM_BYTES[dtype]
    if end - begin != math.prod(shape) * item or begin % item:
        raise ValueError(f"{name} of shape {list(shape)} in {end - begin:,} bytes")
    return TensorEntry(name, dtype, shape, begin, end, checksum)


def unsuperseded(segments: Iterable[Segment], start: int, first: int) -> list[Segment]:
    """The segments of a chain of which something is left when rows from `start` on come after them.

    A mark at `first` itself is left, even where no row is.
    """
    kept = list(segments)
    while kept and _superseded(kept[-1].header, start, first):
        kept.pop()
    return kept


def _superseded(header: Header, start: int, first: int) -> bool:
    return header.start >= start and header.first >= first and all(mark > first for mark in header.marks)


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


class Shelf:
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
            KvchatError: another process holds the shelf for longer than `LOCK_S`.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise KvchatError(
                f"Another kvchat has been writing to {self.root} for {LOCK_S:.0f} s."
            ) from error
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
            return Entry(conversation, held, 0, last_used, {}, str(error))
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
