"""How the user wants the screen: plain values, made from flags, variables and the file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvchat.ui.themes import DARK


@dataclass(frozen=True, slots=True)
class Preferences:
    """What holds for this run."""

    theme: str = DARK.name
    reduced_motion: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    """Command → key, checked."""
    warnings: tuple[str, ...] = ()
    """What was left out of the configuration file, and why."""
    config_file: Path | None = None
    """Where changes are written; None writes none."""
