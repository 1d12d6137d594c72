"""Defaults from the user's configuration file, and how given settings combine.

click reads flags and environment; the file fills in what they leave open:
flag > environment > file > default.
"""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path

from kvchat.catalog import ModelCard
from kvchat.contract import Sampling
from kvchat.errors import KvchatError


def read_config(path: Path, known: Collection[str]) -> dict[str, object]:
    """The settings in a TOML file, named as the long flags are; a missing file has none.

    Raises:
        KvchatError: the file is no TOML, or has a name that is no setting.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KvchatError(f"The configuration {path} can't be read: {error}") from error
    config = {name.replace("-", "_"): value for name, value in given.items()}
    if unknown := sorted(set(config) - set(known)):
        raise KvchatError(
            f"The configuration {path} sets {', '.join(unknown)}, which kvchat doesn't know. "
            f"It knows: {', '.join(sorted(known))}."
        )
    return config


def sampling_of(card: ModelCard | None) -> Sampling:
    """What the card recommends; greedy where there is no card."""
    if card is None:
        return Sampling()
    given = {field.name: getattr(card.defaults, field.name) for field in fields(card.defaults)}
    return changed(Sampling(), given)


def changed(sampling: Sampling, given: Mapping[str, object]) -> Sampling:
    """`sampling` with every value of `given` that is not None and belongs to it."""
    names = {field.name for field in fields(Sampling)}
    return replace(sampling, **{k: v for k, v in given.items() if k in names and v is not None})  # type: ignore[arg-type]
