"""Paths of kvchat's files: the XDG folders, or one folder given by `--data-dir`.

Only computes paths; must not read or create files.
"""

from dataclasses import dataclass
from pathlib import Path

import platformdirs

APP = "kvchat"


@dataclass(frozen=True, slots=True)
class Paths:
    """Every file and folder that kvchat reads or writes."""

    config_file: Path
    """TOML defaults for the flags."""
    database: Path
    """Conversations and turn statistics (SQLite)."""
    models: Path
    """Downloaded and converted models, one folder each."""
    compiled: Path
    """Compiled code, one folder per model. Only the user may have write access to it and to its parent."""
    kv: Path
    """Saved KV caches, one folder per conversation."""
    logs: Path
    """Output of the engine process."""

    def described(self) -> dict[str, Path]:
        """Name → path, in the order `kvchat paths` prints them."""
        return {
            "config": self.config_file,
            "database": self.database,
            "models": self.models,
            "compiled": self.compiled,
            "kv": self.kv,
            "logs": self.logs,
        }


def find_paths(data_dir: Path | None = None) -> Paths:
    """The user's XDG folders; with `data_dir`, everything inside that folder except the config file."""
    config_file = platformdirs.user_config_path(APP) / "config.toml"
    if data_dir is not None:
        root = data_dir.expanduser().absolute()
        return _inside(root, config_file, root / "log")
    return _inside(platformdirs.user_data_path(APP), config_file, platformdirs.user_log_path(APP))


def _inside(data: Path, config_file: Path, logs: Path) -> Paths:
    return Paths(config_file, data / "kvchat.db", data / "models", data / "compiled", data / "kv", logs)
