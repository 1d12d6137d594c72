"""A place for half-done work: a folder that one process at a time may fill, and that never stays.

Knows locks, free space and stale folders; refuses to know what is brought.
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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage of the work is."""

    stage: str
    """`waiting` (for another process), `download`, `unpack`, `convert`, `save`."""
    done: int
    """Bytes in `download` and `unpack`, per cent in `convert`."""
    total: int | None


BYTES = {"download", "unpack"}
"""Stages that count bytes."""
WORDS = {
    "waiting": "waiting for another kvchat that fetches",
    "download": "downloading",
    "unpack": "unpacking",
    "convert": "converting (once)",
    "compile": "compiling for this CPU (once)",
    "save": "saving",
}
"""Each stage as it is shown."""

Report = Callable[[Progress], None]
"""Called from the thread that does the work, at least twice a second while something is waited for; what it
raises stops the work and cleans up."""

HEARTBEAT_S = 0.5
SPARE_BYTES = 100_000_000
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def staging(models_dir: Path, report: Report) -> Iterator[Path]:
    """An empty folder inside `models_dir`, for one process at a time; gone afterwards, whatever happened.

    What dead runs left behind is removed first.

    Raises:
        KvchatError: the folder cannot be written, or the disk filled up while it was used.
    """
    with _explained(models_dir):
        make_private(models_dir)
        with _locked(models_dir, report):
            _remove_stale(models_dir)
            folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=models_dir))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Passes if `needed` bytes are free where the existing `folder` lies.

    Raises:
        KvchatError: they are not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise KvchatError(
            f"Not enough disk space: {_megabytes(needed)} needed, {_megabytes(free)} free in {folder}. "
            "Free some, or choose another place with --data-dir (for hub models: HF_HOME)."
        )


@contextlib.contextmanager
def _explained(models_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise KvchatError(f"The disk of {models_dir} is full: nothing was kept there.") from error
        if error.errno in NOT_WRITABLE:
            where = error.filename or models_dir
            hint = owner_hint(Path(where)) if isinstance(error, PermissionError) else ""
            raise KvchatError(f"Models cannot be written to {where}: {reason(error)}{hint}.") from error
        raise


@contextlib.contextmanager
def _locked(models_dir: Path, report: Report) -> Iterator[None]:
    lock = FileLock(models_dir / ".lock")
    patience = 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            patience = HEARTBEAT_S
            report(Progress("waiting", 0, None))
    try:
        yield
    finally:
        lock.release()


def _remove_stale(models_dir: Path) -> None:
    for folder in models_dir.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
