"""The store without tensors: headers, chains, listing, the cap, missing and damaged files."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain as joined
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from kvchat.cache.disk import disk_store as shelf_module
from kvchat.cache.disk import segment as segment_module
from kvchat.cache.disk.disk_store import DiskStore, NoRoomError, read_chain
from kvchat.cache.disk.segment import (
    OPENING,
    Header,
    SnapshotRefused,
    TensorEntry,
    encode_header,
    header_checksum,
    read_segment,
    runs,
    segment_path,
)
from kvchat.errors import KvchatError

CAP = 1_000_000


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "cache", CAP)


def header(conversation: str, tokens: int, *, start: int = 0, parent: str = "", data: int = 4) -> Header:
    """A segment of that many rows and one tensor of `data` bytes."""
    rows = tuple(range(start, start + tokens))
    tensor = TensorEntry("0.keys", "U8", (data,), 0, data, xxh3_128_hexdigest(bytes(data)))
    return Header(conversation, {"model": "m"}, parent, start, start, rows, rows, rows, {}, (tensor,))


def write(store: DiskStore, said: Header, number: int = 0, *, folder: str = "") -> str:
    """Puts a segment there, its tensors all zeros; returns its checksum."""
    path = segment_path(store.root / (folder or said.conversation), number)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = encode_header(said)
    path.write_bytes(raw + bytes(said.tensor_bytes))
    return header_checksum(raw)


def put(store: DiskStore, conversation: str, size: int, used: int) -> None:
    """A conversation of exactly `size` bytes, used at second `used`."""
    small = write(store, header(conversation, 1, data=1000))
    assert small
    overhead = store.disk_bytes(conversation) - 1000
    for _ in range(3):
        write(store, header(conversation, 1, data=size - overhead))
        overhead += store.disk_bytes(conversation) - size
    assert store.disk_bytes(conversation) == size
    os.utime(store.folder(conversation), (used, used))


@given(st.lists(st.integers(0, 30), max_size=40))
def test_runs_expand_to_the_same_numbers(values: list[int]) -> None:
    spelled = [range(first, first + count) for first, count in runs(values)]
    assert list(joined(*spelled)) == values


def test_a_plain_range_is_one_run() -> None:
    assert runs(range(3, 5000)) == [(3, 4997)]


def test_a_header_is_read_back_as_it_was_written(store: DiskStore) -> None:
    said = replace(header("a", 3), rows=(0, 2), positions=(5, 9), ids=(7, 8, 9), checkpoints={3: 2})
    write(store, said)
    assert read_segment(segment_path(store.root / "a", 0)).header == said


def test_listing_a_store_imports_no_torch() -> None:
    heavy = {"torch", "safetensors", "numpy"}
    code = f"import sys, kvchat.cache.disk.disk_store; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("conversation", ["", ".", "..", "a/b", "../a", "a.b", "a\n", "ä", "a b", "a" * 201])
def test_an_id_that_points_outside_the_root_is_refused(store: DiskStore, conversation: str) -> None:
    with pytest.raises(KvchatError, match="can't be the name"):
        store.folder(conversation)


def test_a_chain_is_merged_as_unpack_would(store: DiskStore) -> None:
    """Rows 0 to 9, then 4 to 6: the earlier rows after 4 are superseded."""
    base = write(store, header("a", 10))
    write(store, header("a", 3, start=4, parent=base), 1)
    chain = store.chain("a")
    assert chain.ids == chain.rows == chain.positions == tuple(range(7))
    assert chain.tensor_bytes == 8
    assert chain.fingerprint == {"model": "m"}


def test_superseded_segments_are_ignored_with_those_they_continued(store: DiskStore) -> None:
    """As a process leaves it that is killed before it removes them: 1 and 2 are superseded by 3."""
    base = write(store, header("a", 10))
    write(store, header("a", 5, start=10, parent="f" * 32), 1)
    write(store, header("a", 5, start=15, parent="e" * 32), 2)
    write(store, header("a", 3, start=10, parent=base), 3)
    chain = store.chain("a")
    assert chain.rows == tuple(range(13))
    assert [segment.path.name for segment in chain.segments] == ["000000.safetensors", "000003.safetensors"]


def test_a_checkpoint_at_the_first_token_of_a_segment_is_not_superseded(store: DiskStore) -> None:
    base = write(store, header("a", 10))
    crop = write(store, replace(header("a", 0, start=5, parent=base), checkpoints={5: 1}), 1)
    write(store, replace(header("a", 3, start=5, parent=crop), checkpoints={8: 1}), 2)
    assert [list(segment.header.checkpoints) for segment in store.chain("a").segments] == [[], [5], [8]]


@pytest.mark.parametrize(("start", "first"), [(11, 10), (10, 11), (4, 2)])
def test_a_segment_that_starts_where_its_chain_does_not_reach_is_refused(
    store: DiskStore, start: int, first: int
) -> None:
    """Or, the last one, whose tokens were read twice."""
    base = write(store, header("a", 10))
    rows = (first, first + 1)
    write(store, replace(header("a", 2, parent=base), start=start, first=first, rows=rows), 1)
    with pytest.raises(SnapshotRefused, match=f"starts at token {first} and row {start} after 10 tokens"):
        store.chain("a")


def test_a_missing_folder_is_an_empty_chain(store: DiskStore) -> None:
    chain = store.chain("a")
    assert (chain.segments, chain.rows, chain.checksum, chain.tensor_bytes) == ((), (), "", 0)


def broken_headers() -> Iterator[tuple[str, Header]]:
    good = header("a", 4, data=8)
    (tensor,) = good.tensors
    other = replace(tensor, name="0.values")

    def tensors(*entries: TensorEntry) -> Header:
        return replace(good, tensors=entries)

    yield "claims a shape that its bytes can't hold", tensors(replace(tensor, shape=(2**40,)))
    yield "claims a shape of many factors", tensors(replace(tensor, shape=(2**40,) * 30))
    yield "claims numbers that don't exist", tensors(replace(tensor, dtype="Q8"))
    yield (
        "lies off its numbers' alignment",
        tensors(replace(tensor, shape=(1,), end=1), replace(other, dtype="F32", shape=(1,), begin=1, end=5)),
    )
    yield "overlaps another", tensors(tensor, replace(other, begin=4, end=12))
    yield "leaves a gap", tensors(tensor, replace(other, begin=16, end=24))
    yield "ends behind the file", tensors(replace(tensor, shape=(2**50,), end=2**50))
    yield "starts before the data", tensors(replace(tensor, begin=-8, end=0))
    yield "has negative dimensions", tensors(replace(tensor, shape=(-2, -4)))
    yield "has rows after its tokens", replace(good, rows=(0, 1, 2, 4))
    yield "has rows that don't ascend", replace(good, rows=(0, 2, 1, 3))
    yield "has more positions than rows", replace(good, positions=(0, 1, 2, 3, 4))
    yield "has fewer positions than rows", replace(good, positions=(0,))
    yield "has a mark after its tokens", replace(good, checkpoints={5: 1})
    yield "has a negative id", replace(good, ids=(0, 1, 2, -3))
    yield "starts in the middle of nothing", replace(good, start=2)
    yield "continues something from row 0 on", replace(good, parent="0" * 32)
    yield "belongs to another conversation", replace(good, conversation="b")


@pytest.mark.parametrize(
    ("what", "said"), broken_headers(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_inconsistent_header_with_a_correct_checksum_is_refused(
    store: DiskStore, what: str, said: Header
) -> None:
    path = segment_path(store.root / "a", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_header(said) + bytes(8))
    with pytest.raises(SnapshotRefused, match=r"a/000000\.safetensors can't be used"):
        store.chain("a")


def test_a_run_of_a_huge_range_is_refused_before_it_is_expanded(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_module, "runs", lambda _values: [(0, 10**15)])
    write(store, header("a", 4))
    with pytest.raises(SnapshotRefused, match="invalid runs of numbers"):
        store.chain("a")


def test_another_format_is_refused_by_its_number(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as future:
        future.setattr(segment_module, "FORMAT", 99)
        write(store, header("a", 4))
    with pytest.raises(SnapshotRefused, match="it has format 99, and this kvchat reads 2"):
        store.chain("a")


@pytest.mark.parametrize("claimed", [2**63, 2**64 - 1, 20_000_000])
def test_a_header_that_claims_a_huge_length_is_refused_without_reading_it(
    store: DiskStore, claimed: int
) -> None:
    """The last one is a sparse file that really is that long."""
    path = segment_path(store.root / "a", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(claimed.to_bytes(8, "little"))
    if claimed < 2**32:
        os.truncate(path, claimed + 8)
    with pytest.raises(SnapshotRefused, match=r"is cut short or garbage|claims a header of 20,000,000 bytes"):
        store.chain("a")


def test_deeply_nested_json_is_refused(store: DiskStore) -> None:
    """With a right checksum, so that it is really parsed."""
    good = encode_header(header("a", 1))
    text = good[8:-8].rstrip(b" }") + b',"x":' + b"[" * 200_000
    raw = len(text).to_bytes(8, "little") + text
    place = slice(8 + len(OPENING), 8 + len(OPENING) + 32)
    raw = raw[: place.start] + header_checksum(raw).encode() + raw[place.stop :]
    path = segment_path(store.root / "a", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(raw)
    with pytest.raises(SnapshotRefused, match="makes no sense"):
        store.chain("a")


def test_a_listing_has_bytes_tokens_and_last_use(store: DiskStore) -> None:
    put(store, "old", 2000, used=100)
    put(store, "new", 3000, used=200)
    entries = store.entries()
    assert [(e.conversation, e.bytes, e.tokens, e.last_used) for e in entries] == [
        ("new", 3000, 1, 200.0),
        ("old", 2000, 1, 100.0),
    ]
    assert entries[0].fingerprint == {"model": "m"}
    assert not entries[0].damage
    assert store.total_bytes() == 5000


def test_a_damaged_conversation_is_listed_with_the_reason_and_can_be_removed(store: DiskStore) -> None:
    write(store, header("a", 4))
    segment_path(store.root / "a", 0).write_bytes(b"garbage")
    segment_path(store.root / "folder", 0).mkdir(parents=True)
    (store.root / "empty").mkdir()
    damages = {entry.conversation: entry.damage for entry in store.entries()}
    assert "is cut short or garbage" in damages["a"]
    assert "can't be read" in damages["folder"]
    assert damages["empty"] == "There is no segment in it."
    assert store.remove("a") == 7
    store.remove("folder")
    store.remove("empty")
    assert store.entries() == []


def test_removing_a_missing_conversation_does_nothing(store: DiskStore) -> None:
    assert store.remove("a") == 0


def test_the_least_recently_used_conversation_is_removed_first(store: DiskStore) -> None:
    for used, name in enumerate(["a", "b", "c", "d"]):
        put(store, name, 250_000, used=used)
    store.touch("a")
    assert store.make_room(0, "d") == []
    assert store.make_room(1, "d") == ["b"]
    assert store.make_room(250_001, "d") == ["c"]
    assert store.conversations() == ["a", "d"]


def test_the_protected_conversation_is_never_removed(store: DiskStore) -> None:
    put(store, "mine", 600_000, used=1)
    put(store, "other", 300_000, used=2)
    assert store.make_room(400_000, "mine") == ["other"]
    assert store.conversations() == ["mine"]


def test_nothing_is_removed_where_the_cap_is_too_small(store: DiskStore) -> None:
    put(store, "mine", 600_000, used=1)
    put(store, "other", 300_000, used=2)
    with pytest.raises(NoRoomError, match=r"would take 1\.0 MB on disk, and all of them may take 1\.0 MB"):
        store.make_room(400_001, "mine")
    assert store.conversations() == ["mine", "other"]


def test_gc_removes_unknown_conversations_and_leftovers_of_killed_processes(store: DiskStore) -> None:
    put(store, "known", 2000, used=1)
    put(store, "unknown", 3000, used=2)
    (store.root / "known" / "000001.tmp").write_bytes(bytes(50))
    (store.root / ".removed-gone").mkdir()
    (store.root / ".removed-gone" / "000000.safetensors").write_bytes(bytes(7))
    assert store.gc({"known", "elsewhere"}) == 3057
    assert sorted(path.name for path in store.root.rglob("*") if path.name != ".lock") == [
        "000000.safetensors",
        "known",
    ]


def test_gc_of_a_missing_store_does_nothing(store: DiskStore) -> None:
    assert store.gc([]) == 0
    assert store.entries() == []


def test_only_the_user_can_read_the_store(store: DiskStore) -> None:
    with store.locked():
        assert stat.S_IMODE(store.root.stat().st_mode) == 0o700


def test_a_second_writer_gets_an_error_about_the_lock(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_module, "LOCK_S", 0.0)
    other = DiskStore(store.root, CAP)
    with store.locked(), pytest.raises(KvchatError, match="Another kvchat has been writing"), other.locked():
        pass
    with other.locked():
        pass


@contextmanager
def vanishing(monkeypatch: pytest.MonkeyPatch, store: DiskStore, conversation: str) -> Iterator[None]:
    """Inside the block, another process removes the conversation just after its folder was looked into."""
    listed = shelf_module._names

    def names(folder: Path) -> Sequence[str]:
        found = listed(folder)
        if folder.name == conversation:
            for name in found:
                (folder / name).unlink()
            if folder.exists():
                folder.rmdir()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(shelf_module, "_names", names)
        yield


def test_files_that_disappear_while_reading_raise_no_error(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "stays", 2000, used=1)
    for act in (
        store.entries,
        store.total_bytes,
        lambda: store.gc({"stays"}),
        lambda: store.make_room(1, "stays"),
    ):
        put(store, "gone", 3000, used=2)
        with vanishing(monkeypatch, store, "gone"):
            act()
        assert [entry.conversation for entry in store.entries()] == ["stays"]
    put(store, "gone", 3000, used=2)
    with vanishing(monkeypatch, store, "gone"):
        assert read_chain(store.root / "gone").segments == ()
    store.touch("gone")
