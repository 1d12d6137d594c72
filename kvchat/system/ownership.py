"""Files and folders that only the user can write, and their digests.

Compiled code is loaded from such folders only: whoever can write a shared library runs code as its loader.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kvchat.errors import KvchatError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
HAS_OWNERS = os.name != "nt"
"""Windows has access control lists instead; other users can't write to a profile's folders there."""


def make_private(folder: Path) -> None:
    """Creates a folder and its missing parents with mode 0700, whatever the umask.

    Raises:
        OSError: it can't be created.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def close_to_others(path: Path) -> None:
    """Removes write permission for everybody but the owner.

    Raises:
        OSError: the user does not own it.
    """
    mode = path.stat().st_mode
    if HAS_OWNERS and mode & OTHERS_WRITE:
        path.chmod(stat.S_IMODE(mode) & ~OTHERS_WRITE)


def require_own(path: Path, top: Path) -> None:
    """Checks that only the user can write `path`, its direct entries, and its parents up to `top`.

    Raises:
        KvchatError: somebody else can write one of them, or it is a link.
        OSError: `path` can't be read.
        ValueError: `path` is not inside `top`.
    """
    inside = path.relative_to(top)
    # `top` itself may be the user's own link
    _require_own(top, top.stat())
    for part in (*reversed(inside.parents[:-1]), inside):
        _require_own(top / part, (top / part).lstat())
    for each in sorted(path.iterdir()):
        with suppress(FileNotFoundError):  # deleted by another process meanwhile
            _require_own(each, each.lstat())


def _require_own(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
        raise KvchatError(f"{path} is neither a file nor a folder. Code is not loaded from there.")
    if not HAS_OWNERS:
        return
    if facts.st_uid != os.geteuid():
        raise KvchatError(f"{path} belongs to another user. Code is not loaded from there.")
    if facts.st_mode & OTHERS_WRITE:
        raise KvchatError(
            f"{path} can be written by other users. Code is not loaded from there: `chmod go-w` closes it."
        )


def digest_of(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def files_in(folder: Path) -> Iterator[Path]:
    """The files directly inside a folder, sorted by name."""
    return (path for path in sorted(folder.iterdir()) if path.is_file())
