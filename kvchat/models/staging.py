"""Staging folders for downloads and conversions: locked, temporary, always removed. Also progress reports.

Handles locks, free space and stale folders. Must not depend on what is downloaded.
"""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kvchat.errors import KvchatError, owner_hint, reason
from kvchat.models.resolve import STAGING_PREFIX
from kvchat.system.ownership import make_private
from kvchat.text import megabytes


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of one stage."""

    stage: str
    """`waiting` (for another process), `download`, `unpack`, `convert`, `save`."""
    done: int
    """Bytes in the stages `BYTES`, else per cent."""
    total: int | None

    @property
    def label(self) -> str:
        """The stage as text for the user."""
        return STAGE_LABELS.get(self.stage, self.stage)


BYTES = {"download", "unpack"}
"""Stages that count bytes."""
STAGE_LABELS = {
    "waiting": "waiting for a download by another kvchat",
    "download": "downloading",
    "unpack": "unpacking",
    "convert": "converting (once)",
    "compile": "compiling for this CPU (once)",
    "save": "saving",
}
"""Stage → text for the user."""

Report = Callable[[Progress], None]
"""Called from the working thread, at least twice a second while it waits; an exception stops the work."""

HEARTBEAT_S = 0.5
SPARE_BYTES = 100_000_000
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def staging(models_dir: Path, report: Report) -> Iterator[Path]:
    """Yields an empty folder inside `models_dir`, for one process at a time, and removes it afterwards.

    Removes folders of killed processes first.

    Raises:
        KvchatError: the folder cannot be written, or the disk is full.
    """
    with _translated(models_dir):
        make_private(models_dir)
        with _locked(models_dir, report):
            _remove_stale(models_dir)
            folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=models_dir))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Checks that `needed` bytes are free on the disk of the existing `folder`.

    Raises:
        KvchatError: they are not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise KvchatError(
            f"Not enough disk space: {megabytes(needed)} needed, {megabytes(free)} free in {folder}. "
            "Free some, or choose another place with --data-dir (for hub models: HF_HOME)."
        )


@contextlib.contextmanager
def _translated(models_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise KvchatError(f"The disk of {models_dir} is full; nothing was saved there.") from error
        if error.errno in NOT_WRITABLE:
            where = error.filename or models_dir
            hint = owner_hint(Path(where)) if isinstance(error, PermissionError) else ""
            raise KvchatError(f"Models cannot be written to {where}: {reason(error)}{hint}.") from error
        raise


@contextlib.contextmanager
def _locked(models_dir: Path, report: Report) -> Iterator[None]:
    lock = FileLock(models_dir / ".lock")
    timeout = 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            timeout = HEARTBEAT_S
            report(Progress("waiting", 0, None))
    try:
        yield
    finally:
        lock.release()


def _remove_stale(models_dir: Path) -> None:
    for folder in models_dir.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
