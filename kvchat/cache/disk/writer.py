"""The thread that writes caches to disk while the conversation goes on.

Segments are written in the order they were submitted. What fails is reported as a sentence and ends nothing;
from then on, rows of that conversation are refused until they start over, so that nothing is ever put after
rows that never got to the disk.

It knows queues and which chain each cache continues. It refuses to know what is in a cache, and when to save.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvchat.cache.disk.disk_store import Chain, DiskStore
from kvchat.cache.disk.snapshot import SavedSegment, save
from kvchat.cache.kv_cache import PackedRows
from kvchat.errors import KvchatError, cause

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How the save of one submitted segment ended."""

    conversation: str
    seconds: float
    """From the start of the write, without the time in the queue."""
    tokens: int = 0
    """Rows written."""
    bytes: int = 0
    """Written."""
    removed: tuple[str, ...] = ()
    """Conversations that made room."""
    error: str = ""
    """Why the rows are not saved, as a sentence; the next save has to start at row 0. Else empty."""


@dataclass(frozen=True, slots=True)
class _Job:
    conversation: str
    fingerprint: Mapping[str, str]
    packed: PackedRows


class DiskWriter:
    """Writes packed rows in a thread of its own, which calls `on_result` once for each submit."""

    def __init__(self, shelf: DiskStore, on_result: Callable[[SaveResult], None]) -> None:
        self._shelf = shelf
        self._on_result = on_result
        self._jobs: deque[_Job] = deque()
        """The first one is being written."""
        self._changed = threading.Condition()
        self._closed = False
        self._checksums: dict[str, str] = {}
        """Conversation → checksum of the chain on disk that its cache continues; guarded by `_changed`."""
        self._thread = threading.Thread(target=self._run, name="kv-saver", daemon=True)
        self._thread.start()

    def adopt(self, chain: Chain) -> None:
        """Notes that a cache was loaded from `chain`: its next rows continue that, and nothing else."""
        with self._changed:
            self._checksums[chain.conversation] = chain.checksum

    def submit(self, conversation: str, fingerprint: Mapping[str, str], packed: PackedRows) -> None:
        """Queues one segment and returns at once.

        Raises:
            RuntimeError: the saver is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the saver is closed")
            self._jobs.append(_Job(conversation, dict(fingerprint), packed))
            self._changed.notify_all()

    def wait(self, conversation: str) -> None:
        """Returns once nothing of a conversation is queued or being written; not for use in `on_result`."""
        with self._changed:
            self._changed.wait_for(lambda: all(job.conversation != conversation for job in self._jobs))

    def flush(self) -> None:
        """Returns once nothing is queued or being written; not for use in `on_result`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def forget(self, conversation: str) -> int:
        """Cancels what is queued, waits for a write that has begun, and removes the folder; returns bytes.

        What is cancelled has no result. Not for use in `on_result`.

        Raises:
            KvchatError: the folder can't be removed, or another process holds the shelf.
        """
        with self._changed:
            running, waiting = list(self._jobs)[:1], list(self._jobs)[1:]
            self._jobs = deque(running + [job for job in waiting if job.conversation != conversation])
        self.wait(conversation)
        with self._changed:
            self._checksums.pop(conversation, None)
        try:
            return self._shelf.remove(conversation)
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
                log.exception("the result of a save could not be told")
            with self._changed:
                self._jobs.popleft()
                del job  # lets go of the tensors while the thread waits
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        """The next job, still in the queue; None where there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return self._jobs[0] if self._jobs else None

    def _write(self, job: _Job) -> SaveResult:
        begun = time.perf_counter()
        with self._changed:
            continues = self._checksums.pop(job.conversation, "")
        try:
            saved = save(self._shelf, job.conversation, job.fingerprint, job.packed, continues)
        except Exception as error:
            if cause(error) is None:
                log.warning("conversation %s is not saved", job.conversation, exc_info=True)
            return SaveResult(job.conversation, time.perf_counter() - begun, error=_sentence(job, error))
        self._keep(job, saved)
        took = time.perf_counter() - begun
        return SaveResult(job.conversation, took, len(job.packed.rows), saved.bytes, saved.removed)

    def _keep(self, job: _Job, saved: SavedSegment) -> None:
        with self._changed:
            self._checksums[job.conversation] = saved.checksum
            for conversation in saved.removed:
                self._checksums.pop(conversation, None)


def _sentence(job: _Job, error: Exception) -> str:
    if isinstance(error, KvchatError):
        return str(error)
    return f"The cache of conversation {job.conversation} could not be saved: {cause(error) or repr(error)}."
