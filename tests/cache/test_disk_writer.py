"""The thread that saves: order, waiting, forgetting, and errors that end nothing."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvchat.cache.disk import disk_store as shelf_module
from kvchat.cache.disk.disk_store import DiskStore
from kvchat.cache.disk.snapshot import load
from kvchat.cache.disk.writer import DiskWriter, SaveResult
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.packed_rows import pack_rows
from kvchat.errors import KvchatError
from tests.cache.test_snapshot import FINGERPRINT, assert_same, new_kv, read


class Desk:
    """A saver on a store, and what it told."""

    def __init__(self, root: Path) -> None:
        self.store = DiskStore(root, 10_000_000)
        self.results: list[SaveResult] = []
        self.saver = DiskWriter(self.store, self.results.append)

    def turn(self, name: str, kv: ConversationKV, tokens: int) -> None:
        """Reads so many tokens and hands them to the saver."""
        read(kv, range(tokens))
        self.saver.submit(name, FINGERPRINT, pack_rows(kv))

    def restored(self, name: str) -> ConversationKV:
        kv = new_kv()
        load(self.store.chain(name), kv, FINGERPRINT)
        return kv

    @property
    def errors(self) -> list[str]:
        return [result.error for result in self.results]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "cache")
    yield desk
    desk.saver.close()


def in_thread(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_turns_are_written_in_order_and_reported(desk: Desk) -> None:
    a, b = new_kv(), new_kv()
    for tokens in (5, 300, 2):
        desk.turn("a", a, tokens)
        desk.turn("b", b, tokens + 1)
    desk.saver.flush()
    assert [result.conversation for result in desk.results] == ["a", "b"] * 3
    assert desk.errors == [""] * 6
    assert all(result.seconds > 0 for result in desk.results)
    assert sum(result.bytes for result in desk.results) == desk.store.total_bytes()
    assert_same(desk.restored("a"), a)
    assert_same(desk.restored("b"), b)


def test_later_changes_of_the_cache_do_not_change_submitted_rows(desk: Desk) -> None:
    kv = new_kv()
    with desk.store.locked():
        desk.turn("a", kv, 5)
        before = kv.fork(5)
        kv.truncate(2)
        read(kv, range(50, 90))
        assert desk.results == []
    desk.saver.wait("a")
    assert_same(desk.restored("a"), before)


def test_waiting_for_a_conversation_ignores_the_others(desk: Desk) -> None:
    with desk.store.locked():
        desk.turn("a", new_kv(), 5)
        desk.saver.wait("b")
        assert desk.results == []
    desk.saver.wait("a")
    assert len(desk.results) == 1


def test_closing_writes_the_queue_and_refuses_more(desk: Desk) -> None:
    kv = new_kv()
    for tokens in (5, 4, 3):
        desk.turn("a", kv, tokens)
    desk.saver.close()
    assert_same(desk.restored("a"), kv)
    with pytest.raises(RuntimeError, match="closed"):
        desk.turn("a", kv, 1)
    desk.saver.close()


def test_a_forgotten_conversation_is_removed_and_not_written_later(desk: Desk) -> None:
    """One write has begun, two are queued; another conversation's is among them."""
    a, b = new_kv(), new_kv()
    with desk.store.locked():
        for tokens in (5, 4, 3):
            desk.turn("a", a, tokens)
            desk.turn("b", b, tokens)
        forgetting = in_thread(lambda: desk.saver.forget("a"))
        forgetting.join(0.2)
        assert forgetting.is_alive()
    forgetting.join()
    desk.saver.flush()
    assert [result.conversation for result in desk.results] == ["a", "b", "b", "b"]
    assert desk.store.conversations() == ["b"]
    assert_same(desk.restored("b"), b)


def test_a_forgotten_conversation_can_only_start_over(desk: Desk) -> None:
    kv = new_kv()
    desk.turn("a", kv, 5)
    assert desk.saver.forget("a") == desk.results[0].bytes
    desk.turn("a", kv, 4)
    desk.saver.flush()
    assert "don't continue what is saved" in desk.errors[-1]
    assert desk.store.conversations() == []


def test_forgetting_an_unsaved_conversation_does_nothing(desk: Desk) -> None:
    assert desk.saver.forget("a") == 0


def failing(error: OSError) -> Callable[[int], None]:
    def fsync(_descriptor: int) -> None:
        raise error

    return fsync


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failing_disk_is_reported_and_earlier_saves_stay(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """What is packed later is refused until the cache starts over: it would follow rows that are missing."""
    kv = new_kv()
    desk.turn("a", kv, 5)
    desk.saver.flush()
    before = desk.restored("a")
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", failing(OSError(code, os.strerror(code))))
        desk.turn("a", kv, 4)
        desk.saver.flush()
    desk.turn("a", kv, 3)
    desk.saver.flush()
    assert desk.errors[1] == f"The cache of conversation a could not be saved: {os.strerror(code)}."
    assert "don't continue what is saved" in desk.errors[2]
    assert_same(desk.restored("a"), before)
    assert [path.suffix for path in desk.store.folder("a").iterdir()] == [".safetensors"]
    kv.saved_rows = 0
    desk.turn("a", kv, 2)
    desk.saver.flush()
    assert desk.errors[3] == ""
    assert_same(desk.restored("a"), kv)


def test_a_crop_after_a_failed_save_does_not_hide_the_missing_rows(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 5 to 8 fail. What follows starts at row 5 again, where the chain on disk ends, and is refused: the
    caller was told that it has to start over."""
    kv = new_kv()
    desk.turn("a", kv, 5)
    desk.saver.flush()
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", failing(OSError(errno.EIO, "broken")))
        desk.turn("a", kv, 4)
        desk.saver.flush()
    kv.truncate(5)
    desk.turn("a", kv, 1)
    desk.saver.flush()
    assert "don't continue what is saved" in desk.errors[-1]


def test_an_invalid_id_is_reported(desk: Desk) -> None:
    desk.turn("../a", new_kv(), 5)
    desk.saver.flush()
    assert "can't be the name of a folder" in desk.errors[0]


def test_a_callback_that_fails_does_not_end_the_thread(tmp_path: Path) -> None:
    told: list[str] = []

    def fail(result: SaveResult) -> None:
        told.append(result.conversation)
        raise RuntimeError("the screen is gone")

    saver = DiskWriter(DiskStore(tmp_path, 10_000_000), fail)
    for name in ("a", "b"):
        kv = new_kv()
        read(kv, range(3))
        saver.submit(name, FINGERPRINT, pack_rows(kv))
    saver.close()
    assert told == ["a", "b"]


def test_a_loaded_cache_continues_its_chain(desk: Desk, tmp_path: Path) -> None:
    kv = new_kv()
    desk.turn("a", kv, 5)
    desk.saver.flush()
    later = Desk(desk.store.root)
    chain, restored = later.store.chain("a"), new_kv()
    load(chain, restored, FINGERPRINT)
    later.saver.adopt(chain)
    later.turn("a", restored, 4)
    later.saver.close()
    assert later.errors == [""]
    assert len(later.store.chain("a").segments) == 2
    assert_same(later.restored("a"), restored)


def test_the_second_of_two_writers_of_a_conversation_gets_an_error(desk: Desk) -> None:
    kv = new_kv()
    desk.turn("a", kv, 5)
    desk.saver.flush()
    other = Desk(desk.store.root)
    chain, theirs = other.store.chain("a"), new_kv()
    load(chain, theirs, FINGERPRINT)
    other.saver.adopt(chain)
    other.turn("a", theirs, 1)
    other.saver.close()
    desk.turn("a", kv, 2)
    desk.saver.flush()
    assert "another process changed it" in desk.errors[-1]
    assert_same(desk.restored("a"), theirs)


def test_removed_conversations_are_reported_and_start_at_row_0(desk: Desk) -> None:
    a, b = new_kv(), new_kv()
    desk.turn("a", a, 300)
    desk.turn("b", b, 300)
    desk.saver.flush()
    desk.store.cap_bytes = desk.store.total_bytes()
    desk.turn("b", b, 1)
    desk.turn("a", a, 1)
    desk.saver.flush()
    assert [result.removed for result in desk.results] == [(), (), ("a",), ()]
    assert desk.errors[2] == ""
    assert "don't continue what is saved" in desk.errors[3]
    assert desk.store.total_bytes() <= desk.store.cap_bytes


def test_a_segment_beyond_the_cap_is_reported_and_removes_nothing(desk: Desk) -> None:
    desk.turn("b", new_kv(), 3)
    desk.saver.flush()
    desk.store.cap_bytes = desk.store.total_bytes() + 1000
    desk.turn("a", new_kv(), 3000)
    desk.saver.flush()
    assert "all of them may take" in desk.errors[-1]
    assert desk.store.conversations() == ["b"]


def test_a_locked_store_is_reported(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "LOCK_S", 0.0)
    other = Desk(desk.store.root)
    with desk.store.locked():
        other.turn("a", new_kv(), 3)
        other.saver.flush()
        with pytest.raises(KvchatError, match="Another kvchat has been writing"):
            other.saver.forget("a")
    other.saver.close()
    assert "Another kvchat has been writing" in other.errors[0]
