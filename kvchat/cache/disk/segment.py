"""One file of a saved cache: the rows that one turn added, and the checksum of the file before it.

A segment is one safetensors file (https://github.com/huggingface/safetensors#format):

    8 bytes        length of the header, little endian
    header, JSON   {"__metadata__": {"checksum": HEX, "segment": JSON}, "0.keys": {dtype, shape, …}, …}
    the tensors    one after the other, without gaps

A header contains the checksum of the previous segment, and its own checksum covers ids, rows, positions, the
checksum of every tensor and so, in turn, all earlier segments: segments of two histories can't be mixed.

Header bytes are untrusted input. Must not import tensors or depend on other files.
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
"""Format 1 could contain uninitialised values in forked quantised layers, so it is not read."""
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
"""Start of every header: the checksum is at a fixed offset and covers every other byte of the header."""


class SnapshotRefused(KvchatError):  # noqa: N818
    """A saved cache can't be used; the sentence says what is wrong and where. The chat's text is safe."""


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
    """The header of a segment: `PackedRows` without the tensors."""

    conversation: str
    fingerprint: Mapping[str, str]
    parent: str
    """The checksum of the previous segment; empty for the first one."""
    start: int
    first: int
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    checkpoints: Mapping[int, int]
    """History length → number of recurrent states saved for it."""
    tensors: tuple[TensorEntry, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes after the header."""
        return self.tensors[-1].end if self.tensors else 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A file whose header was read and validated; its tensors were not."""

    path: Path
    checksum: str
    """xxh3-128 of the header."""
    data_start: int
    """Offset of the tensors in the file, in bytes."""
    header: Header


def refusal(path: Path, what: str) -> SnapshotRefused:
    """The error for a file that can't be used; `what` continues the sentence "it …"."""
    where = f"{path.parent.name}/{path.name}"
    return SnapshotRefused(f"The saved cache {where} can't be used: it {what}.")


def segment_path(folder: Path, number: int) -> Path:
    """The path of segment `number`."""
    return folder / f"{number:06d}.safetensors"


def segment_number(path: Path) -> int:
    """The number in a segment's name."""
    return int(path.stem)


def encode_header(header: Header) -> bytes:
    """The bytes before the tensors, length included; a multiple of 8, as safetensors requires."""
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
    """xxh3-128 of an encoded header without its checksum."""
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
    """The inverse of `runs`.

    Raises:
        ValueError: these aren't runs, or expand to more than `limit` numbers.
    """
    pairs = [_integers(run) for run in _list(value)]
    if any(len(pair) != 2 for pair in pairs) or sum(count for _, count in pairs) > limit:
        raise ValueError("invalid runs of numbers")
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
        raise ValueError("a number that is not a count")
    return tuple(number for number in numbers if isinstance(number, int))


def read_segment(path: Path) -> Segment:
    """Reads the header of one file, and nothing else.

    Raises:
        SnapshotRefused: it isn't a segment of the conversation that the folder is named after, or is damaged.
        FileNotFoundError: it doesn't exist.
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
    """Length and header of a file of `size` bytes, verified by the checksum."""
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
    """Parses a header; a ValueError continues the sentence "it …"."""
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
        raise ValueError("checkpoints outside its tokens")
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
    """The tensors in file order, without gaps or overlaps."""
    if table.keys() != checksums.keys():
        raise ValueError("checksums of other tensors")
    entries = [_entry_of(name, _mapping(table[name]), _text(checksums[name])) for name in table]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    if any(a.end != b.begin for a, b in pairwise(entries)) or (entries and entries[0].begin != 0):
        raise ValueError("tensors that overlap or leave a gap")
    return tuple(entries)


def _entry_of(name: str, fields: Mapping[str, object], checksum: str) -> TensorEntry:
    dtype, shape = _text(fields["dtype"]), _integers(fields["shape"])
    begin, end = _pair(fields["data_offsets"])
    item = ITEM_BYTES[dtype]
    if end - begin != math.prod(shape) * item or begin % item:
        raise ValueError(f"{name} of shape {list(shape)} in {end - begin:,} bytes")
    return TensorEntry(name, dtype, shape, begin, end, checksum)
