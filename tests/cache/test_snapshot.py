"""Saving and loading caches bit for bit; damaged, incomplete and mixed-up files."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.disk.disk_store import DiskStore, NoRoomError, segment_files
from kvchat.cache.disk.segment import Header, SnapshotRefused, encode_header, read_segment, segment_path
from kvchat.cache.disk.snapshot import load, save
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import HeadShape
from kvchat.cache.packed_rows import pack_rows
from kvchat.cache.state_checkpoints import CHECKPOINTS
from kvchat.cache.state_layer import RecurrentLayer
from kvchat.cache.token_index import TokenIndex

SHAPE = HeadShape(kv_heads=2, key_dim=8, value_dim=6)
LAYERS = 3
FINGERPRINT = {"model": "m", "kv": "fp32"}
seeds = count(1)


def new_kv(dtype: torch.dtype = torch.float32, states: int = 0, shape: HeadShape = SHAPE) -> ConversationKV:
    layers: list[DenseLayer | RecurrentLayer] = [DenseLayer(shape, dtype) for _ in range(LAYERS)]
    return ConversationKV([*layers, *(RecurrentLayer() for _ in range(states))])


def read(kv: ConversationKV, ids: Sequence[int]) -> None:
    """A forward pass over `ids` that leaves random states, other ones every time."""
    generator = torch.Generator().manual_seed(next(seeds))
    with kv.append(ids) as cache:
        for index in range(LAYERS):
            keys = torch.randn(1, SHAPE.kv_heads, len(ids), SHAPE.key_dim, generator=generator)
            values = torch.randn(1, SHAPE.kv_heads, len(ids), SHAPE.value_dim, generator=generator)
            cache.update(keys, values, index)
        for layer in kv.states:
            assert isinstance(layer, RecurrentLayer)
            layer.update_conv_state(torch.randn(1, 4, len(ids), generator=generator), conv_kernel_size=3)
            layer.update_recurrent_state(torch.randn(1, 2, 3, generator=generator))
    kv.checkpoint()


def stored(kv: ConversationKV) -> list[torch.Tensor]:
    """Keys and values of the rows, and the live states."""
    tensors = []
    for layer in kv.layers:
        if isinstance(layer, DenseLayer) and layer.keys is not None and layer.values is not None:
            tensors += [layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]]
    return tensors + [tensor for layer in kv.states for _, tensor in sorted(layer.state().tensors.items())]


def marked(kv: ConversationKV, checkpoint: int) -> list[torch.Tensor]:
    """The states of a checkpoint."""
    return [
        tensor for state in kv.checkpoints.states[checkpoint] for _, tensor in sorted(state.tensors.items())
    ]


def assert_equal(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_same(kv: ConversationKV, other: ConversationKV) -> None:
    """The caches are bit-identical; `other` may have older checkpoints that `kv` dropped."""
    assert (kv.ids, kv.rows, kv.positions) == (other.ids, other.rows, other.positions)
    assert kv.checkpoints.states.keys() <= other.checkpoints.states.keys()
    assert len(other.checkpoints.states) <= CHECKPOINTS
    for checkpoint in kv.checkpoints.states:
        assert_equal(marked(kv, checkpoint), marked(other, checkpoint))
    if len(kv):
        assert_equal(stored(kv), stored(other))


class Chat:
    """One conversation on a store, saved the way the engine does."""

    def __init__(self, store: DiskStore, kv: ConversationKV, name: str = "chat") -> None:
        self.store = store
        self.kv = kv
        self.name = name
        self.checksum = ""

    def save(self) -> int:
        """Saves what is new; returns bytes."""
        saved = save(self.store, self.name, FINGERPRINT, pack_rows(self.kv), self.checksum)
        self.checksum = saved.checksum
        return saved.bytes

    def turn(self, tokens: int) -> None:
        """Reads so many tokens and saves them."""
        read(self.kv, range(100, 100 + tokens))
        self.save()

    def restored(self, dtype: torch.dtype = torch.float32) -> ConversationKV:
        """What a new process would load."""
        kv = new_kv(dtype, states=len(self.kv.states))
        load(self.store.chain(self.name), kv, FINGERPRINT)
        return kv


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "cache", 10_000_000)


@pytest.fixture
def chat(store: DiskStore) -> Chat:
    """Three segments of 5, 4 and 3 rows."""
    chat = Chat(store, new_kv())
    for tokens in (5, 4, 3):
        chat.turn(tokens)
    return chat


def segment(chat: Chat, index: int) -> Path:
    return segment_files(chat.store.folder(chat.name))[index]


def assert_refused(chat: Chat, match: str = "") -> None:
    """The chain can't be loaded, the sentence names the conversation, and the cache is left empty."""
    kv = new_kv(states=len(chat.kv.states))
    with pytest.raises(SnapshotRefused, match=match) as refused:
        load(chat.store.chain(chat.name), kv, FINGERPRINT)
    assert chat.name in str(refused.value)
    assert (len(kv), kv.ids, kv.storage_bytes) == (0, (), 0)
    assert all(layer.length == 0 for layer in kv.stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turns_with_crops_between_are_restored_bit_for_bit(store: DiskStore, dtype: torch.dtype) -> None:
    """Crops at a turn's end, inside the last turn, inside an earlier one, and to nothing."""
    chat = Chat(store, new_kv(dtype))
    for crop, tokens in [(0, 300), (300, 20), (310, 7), (100, 50), (150, 1), (20, 600), (0, 9)]:
        chat.kv.truncate(crop)
        chat.turn(tokens)
        restored = chat.restored(dtype)
        assert_same(restored, chat.kv)
        assert restored.storage_bytes <= chat.kv.storage_bytes
        read(restored, [1, 2, 3])
        assert len(restored) == crop + tokens + 3


def test_a_restored_cache_saves_only_new_rows(chat: Chat) -> None:
    whole = chat.store.disk_bytes(chat.name)
    chat.kv = chat.restored()
    written = chat.save()
    assert written < 1500
    chat.turn(2)
    assert_same(chat.restored(), chat.kv)
    assert chat.store.disk_bytes(chat.name) < whole + 4000


def test_a_crop_alone_is_saved(chat: Chat) -> None:
    chat.kv.truncate(6)
    chat.save()
    assert chat.store.chain(chat.name).rows == tuple(range(6))
    assert_same(chat.restored(), chat.kv)


def test_an_emptied_cache_is_saved_as_an_empty_one(chat: Chat) -> None:
    chat.kv.truncate(0)
    chat.save()
    assert_same(chat.restored(), chat.kv)
    chat.turn(4)
    assert_same(chat.restored(), chat.kv)


def test_gaps_and_rotated_keys_are_restored(chat: Chat) -> None:
    chat.kv.select([0, 1, 2, 7, 8, 9, 10, 11])
    chat.turn(3)
    assert_same(chat.restored(), chat.kv)
    chat.kv.truncate(10)
    chat.turn(2)
    assert_same(chat.restored(), chat.kv)
    chat.kv.reindex(TokenIndex(chat.kv.ids, chat.kv.rows, range(len(chat.kv))))
    chat.turn(1)
    restored = chat.restored()
    assert_same(restored, chat.kv)
    assert restored.positions == tuple(range(len(chat.kv)))
    assert restored.index.has_gap


@pytest.mark.parametrize("states", [1, 2])
def test_checkpoints_of_recurrent_layers_are_restored_and_reachable(store: DiskStore, states: int) -> None:
    chat = Chat(store, new_kv(states=states))
    for tokens in (5, 4, 3):
        chat.turn(tokens)
    restored = chat.restored()
    assert_same(restored, chat.kv)
    chat.kv.truncate(9)
    restored.truncate(restored.reachable(11))
    assert_same(restored, chat.kv)
    chat.turn(2)
    assert_same(chat.restored(), chat.kv)


def test_surplus_checkpoints_are_dropped(store: DiskStore) -> None:
    chat = Chat(store, new_kv(states=1))
    for _ in range(CHECKPOINTS + 4):
        chat.turn(2)
    assert_same(chat.restored(), chat.kv)


def test_checkpoints_do_not_reference_the_whole_segment(store: DiskStore) -> None:
    chat = Chat(store, new_kv(states=1))
    chat.turn(500)
    assert chat.restored().storage_bytes == chat.kv.storage_bytes


def test_safetensors_itself_reads_a_segment(chat: Chat) -> None:
    packed = new_kv(states=1)
    read(packed, range(4))
    save(chat.store, "other", FINGERPRINT, rows := pack_rows(packed), "")
    with safe_open(chat.store.folder("other") / "000000.safetensors", "pt") as file:
        assert set(file.keys()) == {*rows.tensors, "mark.4.0.conv.0", "mark.4.0.recurrent.0"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in rows.tensors.items())
        assert json.loads(file.metadata()["segment"])["ids"] == [0, 1, 2, 3]


def test_a_turn_writes_only_its_own_rows(chat: Chat) -> None:
    row = SHAPE.numbers * LAYERS * 4
    sizes = [read_segment(path).header.tensor_bytes for path in segment_files(chat.store.folder(chat.name))]
    assert sizes == [5 * row, 4 * row, 3 * row]


def test_superseded_segments_are_removed(chat: Chat) -> None:
    """A crop into the second one leaves it, a crop to its start removes it and what came after."""
    chat.kv.truncate(7)
    chat.turn(5)
    assert [path.name[:6] for path in segment_files(chat.store.folder(chat.name))] == [
        "000000",
        "000001",
        "000003",
    ]
    chat.kv.truncate(5)
    chat.turn(5)
    assert [path.name[:6] for path in segment_files(chat.store.folder(chat.name))] == ["000000", "000004"]
    assert_same(chat.restored(), chat.kv)


def test_only_the_user_can_read_it(chat: Chat) -> None:
    folder = chat.store.folder(chat.name)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_leftovers_of_a_killed_save_are_removed_by_the_next(chat: Chat) -> None:
    leftover = chat.store.folder(chat.name) / "000003.tmp"
    leftover.write_bytes(b"half a segment")
    assert_same(chat.restored(), chat.kv)
    chat.turn(1)
    assert not leftover.exists()
    assert_same(chat.restored(), chat.kv)


def test_a_killed_save_may_leave_the_segments_it_superseded(chat: Chat, tmp_path: Path) -> None:
    """Every subset of them: they go one by one."""
    old = {path.name: path.read_bytes() for path in segment_files(chat.store.folder(chat.name))}
    chat.kv.truncate(5)
    chat.turn(2)
    for left in ([1, 2], [1], [2], []):
        for name in (f"00000{number}.safetensors" for number in left):
            (chat.store.folder(chat.name) / name).write_bytes(old[name])
        assert_same(chat.restored(), chat.kv)
        chat.kv.truncate(5)
        chat.turn(2)


def truncations() -> Iterator[tuple[str, Callable[[int, int], int]]]:
    """(where, length of the cut file out of file size and start of the tensors)"""
    for length in (0, 1, 7, 8, 9, 40, 100):
        yield f"at {length}", lambda _size, _data, length=length: length  # type: ignore[misc]
    yield "in the header's last byte", lambda _size, data: data - 1
    yield "before the tensors", lambda _size, data: data
    yield "in the first tensor", lambda _size, data: data + 1
    yield "in the middle", lambda size, data: (size + data) // 2
    yield "in the last byte", lambda size, _data: size - 1


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(("where", "length"), truncations(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_cut_segment_is_refused(
    chat: Chat, index: int, where: str, length: Callable[[int, int], int]
) -> None:
    path = segment(chat, index)
    os.truncate(path, length(path.stat().st_size, read_segment(path).data_start))
    assert_refused(chat, "cut short|bytes of tensors instead")


def test_a_segment_that_is_cut_after_its_header_was_read_is_refused(chat: Chat) -> None:
    chain, kv = chat.store.chain(chat.name), new_kv()
    os.truncate(segment(chat, 2), segment(chat, 2).stat().st_size - 1)
    with pytest.raises(SnapshotRefused, match="is cut short"):
        load(chain, kv, FINGERPRINT)
    assert (len(kv), kv.storage_bytes) == (0, 0)


def test_a_segment_removed_after_its_header_was_read_is_refused(chat: Chat) -> None:
    chain, kv = chat.store.chain(chat.name), new_kv()
    segment(chat, 1).unlink()
    with pytest.raises(SnapshotRefused, match="was removed while it was read"):
        load(chain, kv, FINGERPRINT)
    assert (len(kv), kv.storage_bytes) == (0, 0)


def test_longer_segments_are_refused(chat: Chat) -> None:
    with segment(chat, 1).open("ab") as file:
        file.write(b"\0")
    assert_refused(chat, "bytes of tensors instead")


def flip(path: Path, byte: int) -> None:
    """Turns one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << byte % 8
    path.write_bytes(data)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flipped_bit_in_any_tensor_is_refused_by_the_tensors_name(chat: Chat, index: int) -> None:
    path = segment(chat, index)
    said = read_segment(path)
    for entry in said.header.tensors:
        for byte in (entry.begin, (entry.begin + entry.end) // 2, entry.end - 1):
            flip(path, said.data_start + byte)
            assert_refused(chat, f"damaged tensor {entry.name}")
            flip(path, said.data_start + byte)
    assert_same(chat.restored(), chat.kv)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flipped_bit_anywhere_in_the_header_is_refused(chat: Chat, index: int) -> None:
    """Its length and the spaces at its end included."""
    path = segment(chat, index)
    for byte in range(read_segment(path).data_start):
        flip(path, byte)
        with pytest.raises(SnapshotRefused):
            chat.store.chain(chat.name)
        flip(path, byte)
    assert_same(chat.restored(), chat.kv)


@pytest.mark.parametrize(
    "garbage", [b"", b"\0" * 4096, b"\xff" * 4096, b"{}" * 2000, random.Random(1).randbytes(4096)]
)
def test_garbage_is_refused(chat: Chat, garbage: bytes) -> None:
    segment(chat, 1).write_bytes(garbage)
    assert_refused(chat, "garbage|no header that kvchat wrote|claims a header")


def test_another_fingerprint_is_refused_by_the_field_that_differs(chat: Chat) -> None:
    for expected, match in [
        (FINGERPRINT | {"kv": "bf16"}, r"different kv \(fp32 instead of bf16\)"),
        (FINGERPRINT | {"rope": "8192"}, r"different rope \(nothing instead of 8192\)"),
        ({"model": "m"}, r"different kv \(fp32 instead of nothing\)"),
    ]:
        kv = new_kv()
        with pytest.raises(SnapshotRefused, match=match):
            load(chat.store.chain(chat.name), kv, expected)
        assert len(kv) == 0


def test_the_cache_of_another_conversation_is_refused(chat: Chat) -> None:
    shutil.copytree(chat.store.folder(chat.name), chat.store.root / "other")
    with pytest.raises(SnapshotRefused, match=r"other/000000.safetensors .* belongs to conversation chat"):
        chat.store.chain("other")


@pytest.mark.parametrize("index", [0, 1])
def test_a_chain_with_a_missing_segment_is_refused(chat: Chat, index: int) -> None:
    segment(chat, index).unlink()
    assert_refused(chat, "doesn't continue")


def test_a_chain_without_its_last_segment_is_what_was_saved_before(chat: Chat) -> None:
    segment(chat, 2).unlink()
    restored = chat.restored()
    chat.kv.truncate(9)
    assert_same(restored, chat.kv)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_segments_of_two_histories_are_refused(chat: Chat, tmp_path: Path, index: int) -> None:
    """Even where ids, rows and positions are the same, and only the tensors differ."""
    other = Chat(DiskStore(tmp_path / "other", 10_000_000), new_kv())
    for tokens in (5, 4, 3):
        other.turn(tokens)
    shutil.copy(segment(other, index), segment(chat, index))
    assert_refused(chat, "doesn't continue")


def test_a_segment_of_another_model_in_the_chain_is_refused(chat: Chat) -> None:
    path = segment(chat, 2)
    said = read_segment(path)
    data = path.read_bytes()[said.data_start :]
    path.write_bytes(encode_header(replace(said.header, fingerprint={"model": "other"})) + data)
    assert_refused(chat, "made by another model")


@pytest.mark.parametrize(
    ("kv", "match"),
    [
        (new_kv(torch.bfloat16), "keys of F32"),
        (new_kv(shape=HeadShape(1, 8, 6)), r"keys of F32 \[2, 5, 8\], not F32 \[1, 5, 8\]"),
        (new_kv(shape=HeadShape(2, 8, 8)), r"values of F32 \[2, 5, 6\]"),
        (new_kv(states=1), "there is no state of 5 tokens"),
        (
            ConversationKV([DenseLayer(SHAPE, torch.float32) for _ in range(LAYERS - 1)]),
            "this model doesn.t have",
        ),
        (
            ConversationKV([DenseLayer(SHAPE, torch.float32) for _ in range(LAYERS + 1)]),
            "nothing for layer 3",
        ),
    ],
    ids=["dtype", "heads", "dims", "states", "fewer layers", "more layers"],
)
def test_what_does_not_fit_the_model_is_refused(chat: Chat, kv: ConversationKV, match: str) -> None:
    with pytest.raises(
        SnapshotRefused, match=match.replace("keys of", "0.keys of").replace("values of", "0.values of")
    ):
        load(chat.store.chain(chat.name), kv, FINGERPRINT)
    assert (len(kv), [layer.length for layer in kv.stored]) == (0, [0] * len(kv.stored))


@contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Inside the block, this process can't have more than `more` bytes of memory beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def huge(said: Header, rows: int) -> Header:
    """The same segment with tensors of so many rows, one after the other; the checksums are not looked at."""
    begin, entries = 0, []
    for entry in said.tensors:
        shape = (entry.shape[0], rows, entry.shape[2])
        end = begin + shape[0] * shape[1] * shape[2] * 4
        entries.append(replace(entry, shape=shape, begin=begin, end=end))
        begin = end
    return replace(said, tensors=tuple(entries))


def test_huge_tensors_are_refused_before_anything_is_allocated(chat: Chat) -> None:
    """The header is as it should be, the file is sparse and really has terabytes of zeros."""
    path = segment(chat, 0)
    said = huge(read_segment(path).header, 2**32)
    raw = encode_header(said)
    path.write_bytes(raw)
    os.truncate(path, len(raw) + said.tensor_bytes)
    for other in (segment(chat, 2), segment(chat, 1)):
        other.unlink()
    with little_memory(200_000_000):
        assert_refused(chat, r"keys of F32 \[2, 4294967296, 8\], not F32 \[2, 5, 8\]")


def test_rows_without_tensors_are_refused(chat: Chat) -> None:
    path = segment(chat, 0)
    said = read_segment(path).header
    for tensors in ((), said.tensors[:1]):
        cut = replace(said, tensors=tensors)
        path.write_bytes(encode_header(cut) + bytes(cut.tensor_bytes))
        for other in segment_files(chat.store.folder(chat.name))[1:]:
            other.unlink()
        assert_refused(chat, "for layer 0, not keys and values|for layer 1, not keys and values")


def test_loading_an_empty_chain_is_refused(chat: Chat) -> None:
    with pytest.raises(SnapshotRefused, match="No cache of conversation none is saved"):
        load(chat.store.chain("none"), new_kv(), FINGERPRINT)


def test_a_cache_that_is_not_empty_is_not_overwritten(chat: Chat) -> None:
    with pytest.raises(ValueError, match="into an empty one"):
        load(chat.store.chain(chat.name), chat.kv, FINGERPRINT)
    assert len(chat.kv) == 12


def test_rows_never_continue_those_of_another_process(chat: Chat) -> None:
    """Both loaded the same chain; the second one to save gets an error, and may start at row 0."""
    other = Chat(chat.store, chat.restored())
    other.checksum = chat.checksum
    chat.turn(2)
    with pytest.raises(SnapshotRefused, match="another process changed it"):
        other.turn(2)
    assert_same(chat.restored(), chat.kv)
    other.kv.saved_rows = 0
    other.save()
    assert_same(other.restored(), other.kv)


def test_rows_in_the_middle_need_a_chain_that_is_known(chat: Chat) -> None:
    chat.checksum = ""
    with pytest.raises(SnapshotRefused, match="never saved or loaded here"):
        chat.turn(2)


def test_a_chain_is_not_continued_by_another_model(chat: Chat) -> None:
    read(chat.kv, [1])
    with pytest.raises(SnapshotRefused, match="different kv"):
        save(chat.store, chat.name, FINGERPRINT | {"kv": "int8"}, pack_rows(chat.kv), chat.checksum)


def test_a_damaged_chain_is_replaced_by_one_that_starts_over(chat: Chat) -> None:
    segment(chat, 1).write_bytes(b"garbage")
    chat.kv.saved_rows = 0
    chat.save()
    assert_same(chat.restored(), chat.kv)
    assert len(segment_files(chat.store.folder(chat.name))) == 1


def test_the_cap_holds_before_anything_is_written(chat: Chat) -> None:
    """Others go first; a segment that fits nowhere leaves everything as it was."""
    other = Chat(chat.store, new_kv(), "other")
    other.turn(5)
    chat.store.cap_bytes = chat.store.total_bytes()
    read(chat.kv, range(3))
    saved = save(chat.store, chat.name, FINGERPRINT, pack_rows(chat.kv), chat.checksum)
    chat.checksum = saved.checksum
    assert saved.removed == ("other",)
    assert chat.store.total_bytes() <= chat.store.cap_bytes
    before = chat.restored()
    chat.store.cap_bytes = chat.store.total_bytes() + 100
    with pytest.raises(NoRoomError):
        chat.turn(3)
    assert_same(chat.restored(), before)


def test_a_conversation_that_starts_over_may_take_the_place_of_its_old_segments(chat: Chat) -> None:
    chat.store.cap_bytes = chat.store.total_bytes() + 10
    chat.kv.saved_rows = 0
    chat.save()
    assert_same(chat.restored(), chat.kv)
    assert chat.store.total_bytes() <= chat.store.cap_bytes


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 300)),
        st.tuples(st.just("crop"), st.integers(0, 1000)),
        st.tuples(st.just("select"), st.integers(1, 1000)),
        st.tuples(st.just("turn keys"), st.just(0)),
        st.tuples(st.just("save"), st.just(0)),
        st.tuples(st.just("restart"), st.just(0)),
    ),
    max_size=14,
)


def step(chat: Chat, what: str, number: int) -> None:
    kv = chat.kv
    if what == "read":
        read(kv, range(number))
    elif what == "crop":
        kv.truncate(kv.reachable(number % (len(kv.ids) + 1)))
    elif what == "select" and len(kv) and not kv.states:
        kv.select([row for row in range(len(kv)) if row % 7 != number % 7])
    elif what == "turn keys" and not kv.states:
        kv.reindex(TokenIndex(kv.ids, kv.rows, range(len(kv))))
    elif what == "save":
        chat.save()
    elif what == "restart" and chat.checksum:
        chat.save()
        chat.kv = chat.restored()
        assert_same(kv, chat.kv)


@settings(max_examples=60)
@given(STEPS, st.integers(0, 1))
def test_a_load_equals_the_live_cache_after_any_operations(steps: list[tuple[str, int]], states: int) -> None:
    with TemporaryDirectory() as folder:
        chat = Chat(DiskStore(Path(folder), 100_000_000), new_kv(states=states))
        for what, number in steps:
            step(chat, what, number)
        chat.save()
        assert_same(chat.restored(), chat.kv)


def history(turn: int) -> list[int]:
    """The ids after so many turns of the process below: a crop now and then, and five more."""
    ids: list[int] = []
    for i in range(1, turn + 1):
        if i % 3 == 0:
            del ids[-8:]
        if i % 20 == 0:
            ids.clear()
        ids += range(i * 10, i * 10 + 5)
    return ids


def reread(kv: ConversationKV, ids: Sequence[int]) -> None:
    """Reads `ids`, each of which leaves its own number as keys and values."""
    numbers = torch.tensor(ids, dtype=torch.float32)[None, None, :, None]
    with kv.append(ids) as cache:
        for index in range(LAYERS):
            cache.update(numbers.expand(1, 2, -1, 8) + index, numbers.expand(1, 2, -1, 6) - index, index)


def save_for_ever(root: Path, turn: int) -> None:
    """Continues the existing chain until killed."""
    chat = Chat(DiskStore(root, 10_000_000), new_kv())
    chain = chat.store.chain(chat.name)
    if chain.segments:
        load(chain, chat.kv, FINGERPRINT)
        chat.checksum = chain.checksum
    while True:
        turn += 1
        ids = history(turn)
        same = sum(1 for a, b in zip(ids, chat.kv.ids, strict=False) if a == b)
        chat.kv.truncate(same)
        reread(chat.kv, ids[same:])
        chat.save()


def test_a_process_killed_while_saving_leaves_a_chain_that_it_had_saved(tmp_path: Path) -> None:
    """Twelve processes one after the other; each continues the chain of the one before."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.cache.test_snapshot"])
    turns = {tuple(history(turn)): turn for turn in range(1, 2000)}
    chance, turn = random.Random(7), 0
    for _ in range(12):
        process = processes.Process(target=save_for_ever, args=(tmp_path, turn))
        process.start()
        begun = turn
        chat = Chat(DiskStore(tmp_path, 10_000_000), new_kv())
        while not segment_files(tmp_path / "chat"):
            time.sleep(0.01)
        time.sleep(chance.uniform(0.02, 0.3))
        process.kill()
        process.join()
        restored = chat.restored()
        turn = turns[restored.ids]
        assert turn >= begun
        expected = new_kv()
        reread(expected, history(turn))
        assert_same(restored, expected)
    assert turn > 12
    DiskStore(tmp_path, 10_000_000).gc({"chat"})
    assert all(segment_path(tmp_path / "chat", int(p.stem)) == p for p in (tmp_path / "chat").iterdir())
