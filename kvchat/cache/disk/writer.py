"""The thread that writes caches to disk while the conversation continues.

Segments are written in the order of `submit`. A failed write is reported as a sentence; after it, rows of
that conversation are refused until they start at 0, so that no segment continues rows that were not written.

Must not depend on the contents of a cache, or decide when to save.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvchat.cache.disk.disk_store import Chain, DiskStore
from kvchat.cache.disk.snapshot import SavedSegment, save
from kvchat.cache.packed_rows import PackedRows
from kvchat.errors import KvchatError, cause

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveResult:
    """The outcome of one submitted segment."""

    conversation: str
    seconds: float
    """Of the write, without the time in the queue."""
    tokens: int = 0
    """Rows written."""
    bytes: int = 0
    """Written."""
    removed: tuple[str, ...] = ()
    """Conversations whose saved caches were removed to stay under the cap."""
    error: str = ""
    """Why the rows were not saved, as a sentence; the next save has to start at row 0. Empty on success."""


@dataclass(frozen=True, slots=True)
class _Job:
    conversation: str
    fingerprint: Mapping[str, str]
    packed: PackedRows


class DiskWriter:
    """Writes packed rows in its own thread, which calls `on_result` once for each submit."""

    def __init__(self, store: DiskStore, on_result: Callable[[SaveResult], None]) -> None:
        self._store = store
        self._on_result = on_result
        self._jobs: deque[_Job] = deque()
        """The first one is in progress."""
        self._changed = threading.Condition()
        self._closed = False
        self._checksums: dict[str, str] = {}
        """Conversation → checksum of the chain on disk that its cache continues; guarded by `_changed`."""
        self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
        self._thread.start()

    def adopt(self, chain: Chain) -> None:
        """Records that a cache was loaded from `chain`, which its next rows must continue."""
        with self._changed:
            self._checksums[chain.conversation] = chain.checksum

    def submit(self, conversation: str, fingerprint: Mapping[str, str], packed: PackedRows) -> None:
        """Queues one segment and returns at once.

        Raises:
            RuntimeError: the writer is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the writer is closed")
            self._jobs.append(_Job(conversation, dict(fingerprint), packed))
            self._changed.notify_all()

    def wait(self, conversation: str) -> None:
        """Waits for every write of a conversation; must not be called in `on_result`."""
        with self._changed:
            self._changed.wait_for(lambda: all(job.conversation != conversation for job in self._jobs))

    def flush(self) -> None:
        """Waits for every write; must not be called in `on_result`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def forget(self, conversation: str) -> int:
        """Cancels queued writes, waits for one in progress, and removes the folder; returns its bytes.

        Cancelled writes have no result. Must not be called in `on_result`.

        Raises:
            KvchatError: the folder can't be removed, or another process holds the lock.
        """
        with self._changed:
            running, waiting = list(self._jobs)[:1], list(self._jobs)[1:]
            self._jobs = deque(running + [job for job in waiting if job.conversation != conversation])
        self.wait(conversation)
        with self._changed:
            self._checksums.pop(conversation, None)
        try:
            return self._store.remove(conversation)
        except OSError as error:
            raise KvchatError(
                f"The cache of conversation {conversation} can't be removed: {cause(error)}."
            ) from error

    def close(self) -> None:
        """Writes what is queued, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            result = self._write(job)
            try:
                self._on_result(result)
            except Exception:
                log.exception("reporting the result of a save failed")
            with self._changed:
                self._jobs.popleft()
                del job  # frees the tensors while the thread waits
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        """The next job, still in the queue; None once the writer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return self._jobs[0] if self._jobs else None

    def _write(self, job: _Job) -> SaveResult:
        begun = time.perf_counter()
        with self._changed:
            continues = self._checksums.pop(job.conversation, "")
        try:
            saved = save(self._store, job.conversation, job.fingerprint, job.packed, continues)
        except Exception as error:
            if cause(error) is None:
                log.warning("conversation %s is not saved", job.conversation, exc_info=True)
            return SaveResult(job.conversation, time.perf_counter() - begun, error=_sentence(job, error))
        self._record(job, saved)
        took = time.perf_counter() - begun
        return SaveResult(job.conversation, took, len(job.packed.rows), saved.bytes, saved.removed)

    def _record(self, job: _Job, saved: SavedSegment) -> None:
        with self._changed:
            self._checksums[job.conversation] = saved.checksum
            for conversation in saved.removed:
                self._checksums.pop(conversation, None)


def _sentence(job: _Job, error: Exception) -> str:
    if isinstance(error, KvchatError):
        return str(error)
    return f"The cache of conversation {job.conversation} could not be saved: {cause(error) or repr(error)}."
