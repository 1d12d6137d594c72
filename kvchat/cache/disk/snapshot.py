"""Saves a cache to disk and loads it, bit for bit, without pickles.

`save` appends packed rows to a chain as one more segment; `load` reads a chain into an empty cache. A file
gets its name only once it is complete and on disk (write to a temporary file, fsync, rename, fsync of the
folder), so a process may be killed at any moment. Every tensor is verified by its checksum (xxh3,
https://xxhash.com: it detects damage and is no signature).
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from xxhash import xxh3_128_hexdigest

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.disk.disk_store import (
    TEMP_SUFFIX,
    Chain,
    DiskStore,
    NoRoomError,
    read_chain,
    segment_files,
    unsuperseded,
)
from kvchat.cache.disk.segment import (
    Header,
    Segment,
    SnapshotRefused,
    TensorEntry,
    encode_header,
    header_checksum,
    refusal,
    segment_number,
    segment_path,
)
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import StoredLayer
from kvchat.cache.packed_rows import PackedRows, unpack_rows
from kvchat.cache.state_layer import RecurrentState

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

READ_BYTES = 2_000_000
"""Bytes of one read; the checksum is computed while they are still in the CPU cache."""
READ_THREADS = 2
"""One waits for the disk while the other computes a checksum."""


@dataclass(frozen=True, slots=True)
class SavedSegment:
    """The result of a save."""

    checksum: str
    """Of the chain after the save."""
    bytes: int
    """Written."""
    removed: tuple[str, ...]
    """Conversations whose saved caches were removed to stay under the cap."""


def save(
    store: DiskStore, conversation: str, fingerprint: Mapping[str, str], packed: PackedRows, continues: str
) -> SavedSegment:
    """Writes `packed` as one more segment, and removes the segments it supersedes.

    `continues` is the checksum of the chain that the rows before `packed.start` were saved to or loaded from;
    rows that start at 0 replace whatever is saved.

    Raises:
        SnapshotRefused: the chain on disk is another one: another process wrote to it, or removed it.
        KvchatError: the cap is too small, or another process holds the lock.
        OSError: the disk is full or not writable.
    """
    tensors = _named_tensors(packed)
    entries = tuple(_entries(tensors))
    with store.locked():
        folder = store.folder(conversation)
        base = _base(folder, fingerprint, packed, continues) if packed.start else []
        header = encode_header(_header(conversation, fingerprint, packed, base, entries))
        stale = [path for path in segment_files(folder) if path not in {segment.path for segment in base}]
        size = len(header) + (entries[-1].end if entries else 0)
        path = _next_path(folder)
        store.clean(conversation)
        removed = _make_room(store, size, conversation, stale)
        _write(path, [memoryview(header), *map(_bytes_view, tensors.values())])
        for old in stale:
            old.unlink(missing_ok=True)
    return SavedSegment(header_checksum(header), size, tuple(removed))


def load(chain: Chain, kv: ConversationKV, expected: Mapping[str, str]) -> None:
    """Loads a chain into an empty cache.

    Raises:
        SnapshotRefused: its fingerprint differs from `expected`, it doesn't fit the layers, or is damaged;
            the cache stays empty.
        ValueError: `kv` isn't empty.
    """
    if len(kv) or kv.ids:
        raise ValueError("a saved cache is loaded into an empty one")
    if not chain.segments:
        raise SnapshotRefused(f"No cache of conversation {chain.conversation} is saved.")
    _check_fingerprint(chain, expected)
    for segment in chain.segments:
        _check_shapes(segment, kv)
    try:
        _fill(chain, kv)
    except BaseException as error:
        kv.clear()
        if isinstance(error, SnapshotRefused) or not isinstance(error, Exception):
            raise
        raise SnapshotRefused(f"The saved cache {chain.conversation} can't be used: {error}.") from error


def _named_tensors(packed: PackedRows) -> dict[str, torch.Tensor]:
    """Every tensor by its name in the file; widest dtypes first, so that each one is aligned."""
    tensors = dict(packed.tensors)
    for length, states in packed.checkpoints.items():
        for index, state in enumerate(states):
            tensors |= {f"mark.{length}.{index}.{name}": tensor for name, tensor in state.tensors.items()}
    return dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))


def _bytes_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, copied if it is not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _entries(tensors: Mapping[str, torch.Tensor]) -> Iterator[TensorEntry]:
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        checksum = xxh3_128_hexdigest(_bytes_view(tensor))
        yield TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), begin, end, checksum)
        begin = end


def _header(
    conversation: str,
    fingerprint: Mapping[str, str],
    packed: PackedRows,
    base: Sequence[Segment],
    tensors: tuple[TensorEntry, ...],
) -> Header:
    return Header(
        conversation=conversation,
        fingerprint=fingerprint,
        parent=base[-1].checksum if base else "",
        start=packed.start,
        first=packed.first,
        ids=packed.ids,
        rows=packed.rows,
        positions=packed.positions,
        checkpoints={length: len(states) for length, states in packed.checkpoints.items()},
        tensors=tensors,
    )


def _base(folder: Path, fingerprint: Mapping[str, str], packed: PackedRows, continues: str) -> list[Segment]:
    """The segments that `packed` continues."""
    chain = read_chain(folder)
    if not continues or chain.checksum != continues:
        raise SnapshotRefused(
            f"Rows from {packed.start} on of conversation {folder.name} don't continue what is saved: "
            "it was never saved or loaded here, or another process changed it."
        )
    _check_fingerprint(chain, fingerprint)
    return unsuperseded(chain.segments, packed.start, packed.first)


def _make_room(store: DiskStore, size: int, conversation: str, stale: Sequence[Path]) -> list[str]:
    """Makes room for a new segment; deletes the superseded ones first only where there is no other way."""
    try:
        return store.make_room(size, conversation)
    except NoRoomError:
        removed = store.make_room(size - sum(path.stat().st_size for path in stale), conversation)
        for path in stale:
            path.unlink(missing_ok=True)
        return removed


def _next_path(folder: Path) -> Path:
    """The next free number: a name is never used for two segments, since readers may still look for it."""
    return segment_path(folder, max(map(segment_number, segment_files(folder)), default=-1) + 1)


def _write(path: Path, parts: Iterable[memoryview]) -> None:
    """Writes a file atomically."""
    temporary = path.with_suffix(TEMP_SUFFIX)
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700)
        _sync_folder(path.parent.parent)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_fingerprint(chain: Chain, expected: Mapping[str, str]) -> None:
    stored = chain.fingerprint
    for name in sorted(stored.keys() | expected.keys()):
        then, now = stored.get(name, "nothing"), expected.get(name, "nothing")
        if then != now:
            raise SnapshotRefused(
                f"The saved cache {chain.conversation} can't be used: it was made with a different {name} "
                f"({then} instead of {now})."
            )


def _check_shapes(segment: Segment, kv: ConversationKV) -> None:
    """Refuses tensors that don't fit the model, before allocating anything."""
    header = segment.header
    parts: dict[str, dict[str, TensorEntry]] = {}
    for entry in header.tensors:
        owner, name = _owner(entry)
        parts.setdefault(owner, {})[name] = entry
    for index, layer in enumerate(kv.layers):
        if isinstance(layer, StoredLayer):
            found = parts.pop(str(index), {})
            if isinstance(layer, DenseLayer):
                _check_dense(segment, layer, index, found)
    if any(count != len(kv.states) for count in header.checkpoints.values()):
        raise refusal(segment.path, f"doesn't have the states of {len(kv.states)} layers")
    unknown = parts.keys() - {
        f"mark.{checkpoint}.{index}" for checkpoint in header.checkpoints for index in range(len(kv.states))
    }
    if unknown:
        raise refusal(segment.path, f"has tensors {sorted(unknown)[0]}, which this model doesn't have")


def _owner(entry: TensorEntry) -> tuple[str, str]:
    """(`LAYER` or `mark.LENGTH.INDEX`, the rest of the name, which may contain dots)."""
    words = entry.name.split(".", 3 if entry.name.startswith("mark.") else 1)
    return ".".join(words[:-1]), words[-1]


def _check_dense(segment: Segment, layer: DenseLayer, index: int, parts: Mapping[str, TensorEntry]) -> None:
    """Expects keys `[kv_heads, rows, key_dim]` and values `[kv_heads, rows, value_dim]`, or no rows."""
    rows = len(segment.header.rows)
    if not parts and not rows:
        return
    if parts.keys() != {"keys", "values"}:
        raise refusal(
            segment.path, f"has {sorted(parts) or 'nothing'} for layer {index}, not keys and values"
        )
    keys, values = parts["keys"], parts["values"]
    shape, dtype = layer.head_shape, layer.stored_dtype
    heads, key_dim, value_dim = shape or (keys.shape[0], keys.shape[-1], values.shape[-1])
    number = DTYPE_NAMES[dtype] if dtype else keys.dtype
    for entry, dim in ((keys, key_dim), (values, value_dim)):
        if (entry.shape, entry.dtype) != ((heads, rows, dim), number):
            raise refusal(
                segment.path,
                f"has {entry.name} of {entry.dtype} {list(entry.shape)}, not {number} {[heads, rows, dim]}",
            )


def _fill(chain: Chain, kv: ConversationKV) -> None:
    _read_ahead(chain)
    _reserve(chain, kv)
    buffer = torch.empty(max(segment.header.tensor_bytes for segment in chain.segments), dtype=torch.uint8)
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for segment in chain.segments:
            _read_tensors(segment, buffer, threads)
            unpack_rows(kv, _packed(segment, buffer, kv))
            kv.checkpoint()  # drops surplus checkpoints


def _read_ahead(chain: Chain) -> None:
    """Asks the operating system to read all files ahead: much quicker for many short segments."""
    if hasattr(os, "posix_fadvise"):
        for segment in chain.segments:
            with _opened(segment) as descriptor:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)


@contextmanager
def _opened(segment: Segment) -> Iterator[int]:
    """A segment's file descriptor.

    Raises:
        SnapshotRefused: the file doesn't exist any more.
    """
    try:
        descriptor = os.open(segment.path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise refusal(segment.path, "was removed while it was read") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _reserve(chain: Chain, kv: ConversationKV) -> None:
    """Allocates the whole chain at once: growing by each segment would copy the layer every time."""
    rows = max(segment.header.start + len(segment.header.rows) for segment in chain.segments)
    if len(chain.segments) == 1:
        return
    for layer in kv.layers:
        if isinstance(layer, DenseLayer) and layer.head_shape and layer.stored_dtype:
            heads, key_dim, value_dim = layer.head_shape
            nothing = torch.zeros((), dtype=layer.stored_dtype)
            layer.update(nothing.expand(1, heads, rows, key_dim), nothing.expand(1, heads, rows, value_dim))
            layer.truncate(0)


def _read_tensors(segment: Segment, buffer: torch.Tensor, threads: ThreadPoolExecutor) -> None:
    """Reads all tensors to the start of `buffer` and verifies their checksums.

    Raises:
        SnapshotRefused: a checksum is wrong, or the file doesn't exist any more.
    """
    with _opened(segment) as descriptor:
        read = partial(_read_group, descriptor, segment, buffer.numpy().data)
        for _ in threads.map(read, _groups(segment.header.tensors)):
            pass


def _groups(entries: Iterable[TensorEntry]) -> list[list[TensorEntry]]:
    """Neighbours that are read together, about `READ_BYTES` each."""
    groups: list[list[TensorEntry]] = []
    for entry in entries:
        if not groups or entry.end - groups[-1][0].begin > READ_BYTES:
            groups.append([])
        groups[-1].append(entry)
    return groups


def _read_group(
    descriptor: int, segment: Segment, memory: memoryview, entries: Sequence[TensorEntry]
) -> None:
    begin, end = entries[0].begin, entries[-1].end
    while begin < end:
        count = os.preadv(descriptor, [memory[begin:end]], segment.data_start + begin)
        if not count:
            raise refusal(segment.path, "is cut short")
        begin += count
    for entry in entries:
        if xxh3_128_hexdigest(memory[entry.begin : entry.end]) != entry.checksum:
            raise refusal(segment.path, f"has a damaged tensor {entry.name}")


def _packed(segment: Segment, buffer: torch.Tensor, kv: ConversationKV) -> PackedRows:
    """The segment as packed rows, with tensors in `buffer`, which the next segment overwrites.

    Checkpoints, and layers that store tensors without copying, get copies.
    """
    header = segment.header
    tensors: dict[str, torch.Tensor] = {}
    checkpoints = {
        checkpoint: [RecurrentState({}) for _ in range(count)]
        for checkpoint, count in header.checkpoints.items()
    }
    for entry in header.tensors:
        view = buffer[entry.begin : entry.end].view(DTYPES[entry.dtype]).view(entry.shape)
        owner, name = _owner(entry)
        if owner.startswith("mark."):
            _, checkpoint, index = owner.split(".")
            checkpoints[int(checkpoint)][int(index)].tensors[name] = view.clone()
        elif not isinstance(kv.layers[int(owner)], DenseLayer):
            tensors[entry.name] = view.clone()
        elif header.rows:
            tensors[entry.name] = view
    return PackedRows(
        header.start, header.first, header.ids, header.rows, header.positions, tensors, checkpoints
    )
