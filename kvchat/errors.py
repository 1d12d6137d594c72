"""The one exception whose text is meant for the user, and how errors of files and libraries become one.

Everything that goes wrong for a reason the user can act on is raised as `KvchatError`: a sentence that says
what is wrong, where, and what to do. The command line prints it and exits with 1; the screen shows it.

Errors of the system and of libraries are translated at few places: by `cli.main`, by the screen, by the
engine's turn and act, by the engine process, by what saves caches, and by the store.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = {
    "binascii",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "json",
    "safetensors",
    "safetensors_rust",
    "sqlite3",
    "sqlite_utils",
    "tokenizers",
    "tomlkit",
    "tomllib",
    "torch",
    "transformers",
    "zipfile",
    "zlib",
}
"""Packages whose own exceptions say what is wrong with a file, a model or the machine, not with kvchat."""


class KvchatError(Exception):
    """A clear sentence for the user; never a traceback."""


def reason(error: Exception) -> str:
    """What went wrong in the system's own words, without its numbers and the path that the sentence names."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def cause(error: Exception) -> str | None:
    """What went wrong, without a full stop at the end; None for an error that only a defect of kvchat raises.

    A file that the system refused is named, with its owner where that is another user.
    """
    match error:
        case KvchatError():
            return str(error).removesuffix(".")
        case OSError():
            place = error.filename if isinstance(error.filename, str | os.PathLike) else None
            words = f"{Path(place)}: {reason(error)}" if place else reason(error) or type(error).__name__
            return words + (owner_hint(Path(place)) if place and isinstance(error, PermissionError) else "")
        case UnicodeError():
            return f"it has bytes or characters that are not UTF-8 ({' '.join(str(error).split())})"
        case MemoryError():
            return "there is not enough memory"
    package = type(error).__module__.partition(".")[0]
    if package not in LIBRARIES:
        return None
    words = " ".join(str(error).split())
    return words.removesuffix(".") or type(error).__name__


def as_sentence(error: Exception) -> str:
    """One sentence for any error; one that only a defect of kvchat raises is named with its class."""
    if isinstance(error, KvchatError):
        return str(error)
    found = cause(error)
    return f"{found[:1].upper()}{found[1:]}." if found else f"{type(error).__name__}: {error}"


@contextmanager
def translating(what: str, kind: type[KvchatError] = KvchatError) -> Iterator[None]:
    """Inside the block, errors of files and libraries become a `kind`: the sentence `what: cause.`

    A `KvchatError` passes as it is, and so does what only a defect raises.
    """
    try:
        yield
    except KvchatError:
        raise
    except Exception as error:
        if (found := cause(error)) is None:
            raise
        raise kind(f"{what}: {found}.") from error


def owner_hint(path: Path) -> str:
    """What to do where a file belongs to another user, as after one start with `sudo`; else empty."""
    if sys.platform == "win32":
        return ""
    for place in (path, *path.parents):
        try:
            owner = place.lstat().st_uid
        except OSError:  # not there, or in a folder that can't be looked into
            continue
        if owner == os.geteuid() or place == Path(place.anchor):
            return ""
        you = _user_name(os.geteuid())
        return (
            f" ({place} belongs to {_user_name(owner)}, and you are {you}: "
            f"after a start with sudo, `sudo chown -R {you} {place}` gives it back)"
        )
    return ""


def _user_name(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
