"""`KvchatError`, the exception whose text is shown to the user, and the translation of other errors into it.

Every failure that the user can do something about is a `KvchatError`: a sentence that says what is wrong,
where, and what to do. The command line prints it and exits with 1; the screen shows it.

Errors of the system and of libraries are translated in `cli.main`, in the screen, in the engine's turns and
commands, in the engine process, where caches are saved, and in the store.
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
"""Packages whose exceptions describe a problem with a file, a model or the machine, not a defect."""


class KvchatError(Exception):
    """A sentence for the user, shown without a traceback."""


def reason(error: Exception) -> str:
    """The system's description of an error, without error number and path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def cause(error: Exception) -> str | None:
    """The cause of an error, without a full stop at the end; None for a defect of kvchat.

    Names the file, and its owner where that is another user.
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
    """One sentence for any error; for a defect of kvchat with the name of its class."""
    if isinstance(error, KvchatError):
        return str(error)
    found = cause(error)
    return f"{found[:1].upper()}{found[1:]}." if found else f"{type(error).__name__}: {error}"


@contextmanager
def translating(what: str, kind: type[KvchatError] = KvchatError) -> Iterator[None]:
    """Inside the block, errors of files and libraries become a `kind` with the sentence `what: cause.`

    A `KvchatError` and defects of kvchat pass unchanged.
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
    """What to do where a file belongs to another user, for instance after a start with `sudo`; else empty."""
    if sys.platform == "win32":
        return ""
    for place in (path, *path.parents):
        try:
            owner = place.lstat().st_uid
        except OSError:  # missing, or in a folder that can't be read
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
