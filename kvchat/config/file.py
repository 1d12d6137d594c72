"""Reads and writes the user's configuration file: TOML with settings by name and a table `[keys]`.

Writing preserves comments. What the settings mean is in `config.settings`.
"""

import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.config.settings import SETTINGS, Setting, Value
from kvchat.errors import KvchatError, owner_hint, reason
from kvchat.text import one_line

if TYPE_CHECKING:  # read at every start, written seldom
    from tomlkit import TOMLDocument

KEYS = "keys"
HEADER = "kvchat's settings. A flag and a variable KVCHAT_... win over this file; F2 in the chat edits it."


@dataclass(frozen=True, slots=True)
class Config:
    """The contents of the file."""

    values: Mapping[str, object] = field(default_factory=dict)
    """Valid values, by `Setting.key`."""
    keys: object = field(default_factory=dict)
    """The table `[keys]`, not validated."""
    wrong: Mapping[str, str] = field(default_factory=dict)
    """`Setting.key` of each invalid value → a sentence that says where and why."""
    unknown: tuple[str, ...] = ()
    """A sentence for each unknown name."""

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for everything that is ignored."""
        return (*self.unknown, *self.wrong.values())


def read_config(path: Path) -> Config:
    """Reads the settings from a TOML file; their names are those of the long flags. A missing file has none.

    Unknown names and invalid values are ignored and described.

    Raises:
        KvchatError: the file can't be read, or is not valid TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return Config()
    except (OSError, ValueError, RecursionError) as error:
        raise KvchatError(f"The configuration {path} can't be read: {_why(error, path)}.") from error
    keys = given.pop(KEYS, {})
    known = {setting.key: setting for setting in SETTINGS}
    values, wrong, unknown = dict[str, object](), dict[str, str](), list[str]()
    for name, value in given.items():
        place = f"{path}, {_line_of(text, name)}"
        if (setting := known.get(name.replace("-", "_"))) is None:
            unknown.append(f"{place}{one_line(name)} is not a setting and is ignored. {_suggestion(name)}")
            continue
        try:
            setting.check(value)
            values[setting.key] = value
        except KvchatError as error:
            wrong[setting.key] = f"{place}{error}"
    return Config(values, keys, wrong, tuple(unknown))


def _why(error: Exception, path: Path) -> str:
    return " ".join(reason(error).split()) + (owner_hint(path) if isinstance(error, PermissionError) else "")


def _line_of(text: str, name: str) -> str:
    """`line 3: ` for the first key or table of that name (tomllib gives no lines); empty if not found."""
    spelled = re.compile(rf"""\s*\[*\s*["']?{re.escape(name)}["']?\s*[=.\]]""")
    lines = enumerate(text.splitlines(), start=1)
    return next((f"line {number}: " for number, line in lines if spelled.match(line)), "")


def _suggestion(name: str) -> str:
    near = get_close_matches(name.replace("_", "-"), [setting.name for setting in SETTINGS], n=1)
    return f"Did you mean {near[0]}?" if near else "`kvchat config list` lists all settings."


def write_setting(path: Path, setting: Setting, value: Value | None) -> None:
    """Sets one setting in the file, or removes it if `value` is None; the rest is unchanged, with comments.

    Raises:
        KvchatError: the file can't be read or written.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        text = path.read_text(encoding="utf-8") if path.exists() else f"# {HEADER}\n"
        document = tomlkit.parse(text)
        _put(document, setting, value)
        _replace(path, tomlkit.dumps(document))
    except (OSError, UnicodeError, TOMLKitError) as error:
        raise KvchatError(f"The configuration {path} can't be changed: {_why(error, path)}.") from error


def _put(document: "TOMLDocument", setting: Setting, value: Value | None) -> None:
    spelled = next((name for name in (setting.name, setting.key) if name in document), None)
    if value is None:
        if spelled:
            document.remove(spelled)
    else:
        document[spelled or setting.name] = value


def _replace(path: Path, text: str) -> None:
    """Replaces the file atomically. Follows symbolic links and preserves the mode."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".config-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        if path.exists():
            Path(name).chmod(path.stat().st_mode & 0o777)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
