"""The user's configuration file: settings by name, and `[keys]`. TOML, read as it is and written with its
comments kept.

It knows the file; what the settings mean is `settings`' business.
"""

import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.config.settings import SETTINGS, Setting, Value
from kvchat.errors import KvchatError, reason

if TYPE_CHECKING:  # read at every start, written seldom
    from tomlkit import TOMLDocument

KEYS = "keys"
HEADER = "kvchat's settings. A flag and a variable KVCHAT_... win over this file; F2 in the chat edits it."


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says."""

    values: Mapping[str, object] = field(default_factory=dict)
    """By the settings' Python names."""
    keys: object = field(default_factory=dict)
    """What stands under `[keys]`, unchecked."""


def read_config(path: Path) -> Config:
    """The settings in a TOML file, named as the long flags are; a missing file has none.

    Raises:
        KvchatError: the file is no TOML, or has a name that is no setting.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Config()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KvchatError(f"The configuration {path} can't be read: {reason(error)}") from error
    keys = given.pop(KEYS, {})
    values = {name.replace("-", "_"): value for name, value in given.items()}
    known = {setting.key for setting in SETTINGS}
    if unknown := sorted(set(values) - known):
        raise KvchatError(
            f"The configuration {path} sets {', '.join(unknown)}, which kvchat doesn't know. "
            f"It knows: {', '.join(sorted(known))}, and a table [keys]."
        )
    return Config(values, keys)


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
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise KvchatError(f"The configuration {path} can't be changed: {reason(error)}") from error


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
