"""One file of a saved cache: the rows that were new after one turn, and what they continue.

A segment is one safetensors file (https://github.com/huggingface/safetensors#format):

    8 bytes        length of the header, little endian
    header, JSON   {"__metadata__": {"checksum": HEX, "segment": JSON}, "0.keys": {dtype, shape, …}, …}
    the tensors    one after the other, without gaps

Each one names the checksum of the one it continues, and that checksum covers ids, rows, positions, the
checksum of every tensor and, in turn, everything before: parts of two histories can't be taken for one.

It knows the bytes of a header and trusts none of them. It refuses to know tensors, and which other files
there are.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_128_hexdigest

from kvchat.errors import KvchatError, cause

FORMAT = 2
"""1: quantised layers that shared memory could hold uninitialised values; such files are read again."""
MAX_HEADER_BYTES = 16_000_000
"""128,000 ids and the tensors of 100 layers are 1 MB."""
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

CHECKSUM_DIGITS = 32
OPENING = b'{"__metadata__":{"checksum":"'
"""How every header begins: the checksum lies at a fixed place, and is of every other byte of the header."""


class SnapshotRefused(KvchatError):  # noqa: N818
    """A saved cache can't be used; the sentence says what is wrong and where. The text still opens."""


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
    checkpoints: Mapping[int, int]
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
        "marks": list(header.checkpoints.items()),
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
        raise refusal(path, f"can't be read ({cause(error)})") from error
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
    checkpoints = dict(_pair(checkpoint) for checkpoint in _list(segment["marks"]))
    parent = _text(segment["parent"])
    end = first + len(ids)
    if len(positions) != len(rows) or any(a >= b for a, b in pairwise((first - 1, *rows, end))):
        raise ValueError("rows that are no rows of its tokens")
    if any(not first <= checkpoint <= end for checkpoint in checkpoints):
        raise ValueError("marks outside its tokens")
    if bool(start) != bool(parent) or (first and not start):
        raise ValueError("a beginning that continues something")
    checksums = _mapping(segment["checksums"])
    fingerprint = {name: _text(value) for name, value in _mapping(segment["fingerprint"]).items()}
    tensors = _tensors_of(table, checksums)
    conversation = _text(segment["conversation"])
    return Header(conversation, fingerprint, parent, start, first, ids, rows, positions, checkpoints, tensors)


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
