"""The writer's thread: order, waiting, forgetting, and errors that don't end it."""

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


class Setup:
    """A writer on a store, and its results."""

    def __init__(self, root: Path) -> None:
        self.store = DiskStore(root, 10_000_000)
        self.results: list[SaveResult] = []
        self.writer = DiskWriter(self.store, self.results.append)

    def turn(self, name: str, kv: ConversationKV, tokens: int) -> None:
        """Reads so many tokens and hands them to the writer."""
        read(kv, range(tokens))
        self.writer.submit(name, FINGERPRINT, pack_rows(kv))

    def restored(self, name: str) -> ConversationKV:
        kv = new_kv()
        load(self.store.chain(name), kv, FINGERPRINT)
        return kv

    @property
    def errors(self) -> list[str]:
        return [result.error for result in self.results]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    setup = Setup(tmp_path / "cache")
    yield setup
    setup.writer.close()


def in_thread(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_turns_are_written_in_order_and_reported(setup: Setup) -> None:
    a, b = new_kv(), new_kv()
    for tokens in (5, 300, 2):
        setup.turn("a", a, tokens)
        setup.turn("b", b, tokens + 1)
    setup.writer.flush()
    assert [result.conversation for result in setup.results] == ["a", "b"] * 3
    assert setup.errors == [""] * 6
    assert all(result.seconds > 0 for result in setup.results)
    assert sum(result.bytes for result in setup.results) == setup.store.total_bytes()
    assert_same(setup.restored("a"), a)
    assert_same(setup.restored("b"), b)


def test_later_changes_of_the_cache_do_not_change_submitted_rows(setup: Setup) -> None:
    kv = new_kv()
    with setup.store.locked():
        setup.turn("a", kv, 5)
        before = kv.fork(5)
        kv.truncate(2)
        read(kv, range(50, 90))
        assert setup.results == []
    setup.writer.wait("a")
    assert_same(setup.restored("a"), before)


def test_waiting_for_a_conversation_ignores_the_others(setup: Setup) -> None:
    with setup.store.locked():
        setup.turn("a", new_kv(), 5)
        setup.writer.wait("b")
        assert setup.results == []
    setup.writer.wait("a")
    assert len(setup.results) == 1


def test_closing_writes_the_queue_and_refuses_more(setup: Setup) -> None:
    kv = new_kv()
    for tokens in (5, 4, 3):
        setup.turn("a", kv, tokens)
    setup.writer.close()
    assert_same(setup.restored("a"), kv)
    with pytest.raises(RuntimeError, match="closed"):
        setup.turn("a", kv, 1)
    setup.writer.close()


def test_a_forgotten_conversation_is_removed_and_not_written_later(setup: Setup) -> None:
    """One write has begun, two are queued; another conversation's is among them."""
    a, b = new_kv(), new_kv()
    with setup.store.locked():
        for tokens in (5, 4, 3):
            setup.turn("a", a, tokens)
            setup.turn("b", b, tokens)
        forgetting = in_thread(lambda: setup.writer.forget("a"))
        forgetting.join(0.2)
        assert forgetting.is_alive()
    forgetting.join()
    setup.writer.flush()
    assert [result.conversation for result in setup.results] == ["a", "b", "b", "b"]
    assert setup.store.conversations() == ["b"]
    assert_same(setup.restored("b"), b)


def test_a_forgotten_conversation_can_only_start_over(setup: Setup) -> None:
    kv = new_kv()
    setup.turn("a", kv, 5)
    assert setup.writer.forget("a") == setup.results[0].bytes
    setup.turn("a", kv, 4)
    setup.writer.flush()
    assert "don't continue what is saved" in setup.errors[-1]
    assert setup.store.conversations() == []


def test_forgetting_an_unsaved_conversation_does_nothing(setup: Setup) -> None:
    assert setup.writer.forget("a") == 0


def failing(error: OSError) -> Callable[[int], None]:
    def fsync(_descriptor: int) -> None:
        raise error

    return fsync


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failing_disk_is_reported_and_earlier_saves_stay(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """What is packed later is refused until the cache starts over: it would follow rows that are missing."""
    kv = new_kv()
    setup.turn("a", kv, 5)
    setup.writer.flush()
    before = setup.restored("a")
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", failing(OSError(code, os.strerror(code))))
        setup.turn("a", kv, 4)
        setup.writer.flush()
    setup.turn("a", kv, 3)
    setup.writer.flush()
    assert setup.errors[1] == f"The cache of conversation a could not be saved: {os.strerror(code)}."
    assert "don't continue what is saved" in setup.errors[2]
    assert_same(setup.restored("a"), before)
    assert [path.suffix for path in setup.store.folder("a").iterdir()] == [".safetensors"]
    kv.saved_rows = 0
    setup.turn("a", kv, 2)
    setup.writer.flush()
    assert setup.errors[3] == ""
    assert_same(setup.restored("a"), kv)


def test_a_crop_after_a_failed_save_does_not_hide_the_missing_rows(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 5 to 8 fail. What follows starts at row 5 again, where the chain on disk ends, and is refused: the
    caller was told that it has to start over."""
    kv = new_kv()
    setup.turn("a", kv, 5)
    setup.writer.flush()
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", failing(OSError(errno.EIO, "broken")))
        setup.turn("a", kv, 4)
        setup.writer.flush()
    kv.truncate(5)
    setup.turn("a", kv, 1)
    setup.writer.flush()
    assert "don't continue what is saved" in setup.errors[-1]


def test_an_invalid_id_is_reported(setup: Setup) -> None:
    setup.turn("../a", new_kv(), 5)
    setup.writer.flush()
    assert "can't be the name of a folder" in setup.errors[0]


def test_a_callback_that_fails_does_not_end_the_thread(tmp_path: Path) -> None:
    told: list[str] = []

    def fail(result: SaveResult) -> None:
        told.append(result.conversation)
        raise RuntimeError("the screen is gone")

    writer = DiskWriter(DiskStore(tmp_path, 10_000_000), fail)
    for name in ("a", "b"):
        kv = new_kv()
        read(kv, range(3))
        writer.submit(name, FINGERPRINT, pack_rows(kv))
    writer.close()
    assert told == ["a", "b"]


def test_a_loaded_cache_continues_its_chain(setup: Setup, tmp_path: Path) -> None:
    kv = new_kv()
    setup.turn("a", kv, 5)
    setup.writer.flush()
    later = Setup(setup.store.root)
    chain, restored = later.store.chain("a"), new_kv()
    load(chain, restored, FINGERPRINT)
    later.writer.adopt(chain)
    later.turn("a", restored, 4)
    later.writer.close()
    assert later.errors == [""]
    assert len(later.store.chain("a").segments) == 2
    assert_same(later.restored("a"), restored)


def test_the_second_of_two_writers_of_a_conversation_gets_an_error(setup: Setup) -> None:
    kv = new_kv()
    setup.turn("a", kv, 5)
    setup.writer.flush()
    other = Setup(setup.store.root)
    chain, theirs = other.store.chain("a"), new_kv()
    load(chain, theirs, FINGERPRINT)
    other.writer.adopt(chain)
    other.turn("a", theirs, 1)
    other.writer.close()
    setup.turn("a", kv, 2)
    setup.writer.flush()
    assert "another process changed it" in setup.errors[-1]
    assert_same(setup.restored("a"), theirs)


def test_removed_conversations_are_reported_and_start_at_row_0(setup: Setup) -> None:
    a, b = new_kv(), new_kv()
    setup.turn("a", a, 300)
    setup.turn("b", b, 300)
    setup.writer.flush()
    setup.store.cap_bytes = setup.store.total_bytes()
    setup.turn("b", b, 1)
    setup.turn("a", a, 1)
    setup.writer.flush()
    assert [result.removed for result in setup.results] == [(), (), ("a",), ()]
    assert setup.errors[2] == ""
    assert "don't continue what is saved" in setup.errors[3]
    assert setup.store.total_bytes() <= setup.store.cap_bytes


def test_a_segment_beyond_the_cap_is_reported_and_removes_nothing(setup: Setup) -> None:
    setup.turn("b", new_kv(), 3)
    setup.writer.flush()
    setup.store.cap_bytes = setup.store.total_bytes() + 1000
    setup.turn("a", new_kv(), 3000)
    setup.writer.flush()
    assert "all of them may take" in setup.errors[-1]
    assert setup.store.conversations() == ["b"]


def test_a_locked_store_is_reported(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "LOCK_S", 0.0)
    other = Setup(setup.store.root)
    with setup.store.locked():
        other.turn("a", new_kv(), 3)
        other.writer.flush()
        with pytest.raises(KvchatError, match="Another kvchat has been writing"):
            other.writer.forget("a")
    other.writer.close()
    assert "Another kvchat has been writing" in other.errors[0]
