"""The user's configuration file: settings by name, and `[keys]`. TOML, read as it is and written with its
comments kept.

It knows the file; what the settings mean is `settings`' business.
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
    """What the file says."""

    values: Mapping[str, object] = field(default_factory=dict)
    """By the settings' Python names; only those that the settings take."""
    keys: object = field(default_factory=dict)
    """What stands under `[keys]`, unchecked."""
    wrong: Mapping[str, str] = field(default_factory=dict)
    """Settings whose value can't be used, with a sentence that says where and why."""
    unknown: tuple[str, ...] = ()
    """A sentence for each name that is no setting."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Every sentence about what is left out."""
        return (*self.unknown, *self.wrong.values())


def read_config(path: Path) -> Config:
    """The settings in a TOML file, named as the long flags are; a missing file has none.

    A name that is no setting, or a value that a setting does not take, is left out and described.

    Raises:
        KvchatError: the file can't be read, or is no TOML.
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
            unknown.append(f"{place}{one_line(name)} is no setting{_meant(name)}. It is left out.")
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
    """`line 3: `, where a key or a table of that name stands: tomllib tells no places. Empty without one."""
    spelled = re.compile(rf"""\s*\[*\s*["']?{re.escape(name)}["']?\s*[=.\]]""")
    lines = enumerate(text.splitlines(), start=1)
    return next((f"line {number}: " for number, line in lines if spelled.match(line)), "")


def _meant(name: str) -> str:
    """What was probably meant."""
    near = get_close_matches(name.replace("_", "-"), [setting.name for setting in SETTINGS], n=1)
    return f"; perhaps {near[0]} is meant" if near else "; `kvchat config list` lists them"


def write_setting(path: Path, setting: Setting, value: Value | None) -> None:
    """Sets one setting in the file, or takes it out; everything else stays as it was, comments too.

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
    """In one step: whoever reads meanwhile sees the old file or the new one. A link stays a link."""
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
