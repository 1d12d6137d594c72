"""Validation of untrusted values against types: imports, database rows, model cards and engine requests.

msgspec validates; errors name the field and describe the expected value in words.
"""

import re
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from kvchat.errors import KvchatError
from kvchat.text import either, one_line, shortened
from kvchat.validation.bounds import DESCRIBED

Checked = TypeVar("Checked")

PLACE = re.compile(r" - at (`key` in )?`\$?\.?(?P<place>.*)`\Z", re.DOTALL)
STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
"""One step of a path: a field's name, or an index."""
KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
    "array": "a list",
    "object": "a table of fields",
}
"""msgspec's names of types, in words."""
LIMITS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
SHOWN = 40
"""Characters of a wrong value in an error message."""


class InvalidError(ValueError):
    """A value is invalid."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field} {why}".strip())
        self.field = field
        """Path of the field: `sampling.temperature`, `token_ids[3]`; empty for the value as a whole."""
        self.why = why
        """What was expected: `must be at most 5, not 77`."""


def checked(kind: type[Checked], given: object) -> Checked:
    """Validates `given`, a mapping or a dataclass with the same fields, and returns it as a value of `kind`.

    Text and numbers are not converted into each other.

    Raises:
        InvalidError: for the first invalid field.
    """
    # msgspec does not look into dataclass instances; it validates mappings field by field
    plain = msgspec.to_builtins(given) if is_dataclass(given) else given
    try:
        return msgspec.convert(plain, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _in_words(str(error), kind, plain) from error


def refuse_bytes(text: str, what: str) -> None:
    """Passes text. Bytes of the command line that are not UTF-8 come as lone surrogates.

    Raises:
        KvchatError: there are some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise KvchatError(f"{what} is not text: it has bytes that are not UTF-8.") from error


def with_defaults(kind: type[Checked], given: Mapping[str, object]) -> tuple[Checked, list[InvalidError]]:
    """Like `checked`, but an invalid field with a default gets its default.

    Returns:
        The value, and the errors of the fields that were replaced.

    Raises:
        InvalidError: a field without a default is invalid or missing.
    """
    values, wrong = dict(given), list[InvalidError]()
    optional = _with_default(cast(Hashable, kind))
    while True:
        try:
            return checked(kind, values), wrong
        except InvalidError as error:
            name = _first_step(error.field)
            if name not in values or name not in optional:
                raise
            wrong.append(error)
            del values[name]


@cache
def _with_default(kind: Hashable) -> set[str]:
    return {
        f.name
        for f in fields(cast(Any, kind))
        if f.default is not MISSING or f.default_factory is not MISSING
    }


def _first_step(place: str) -> str:
    step = STEP.match(place)
    return step[1] if step and step[1] else ""


def _in_words(said: str, kind: object, given: object) -> InvalidError:
    """msgspec's error message as field and expectation."""
    found = PLACE.search(said)
    place, what = (found["place"], said[: found.start()]) if found else ("", said)
    if missing := re.match(r"Object (missing required|contains unknown) field `(.*)`", what):
        why = "is missing" if missing[1].startswith("missing") else "is not a field here"
        return InvalidError(f"{place}.{missing[2]}".lstrip("."), why)
    steps = [name or int(index) for name, index in STEP.findall(place)]
    return InvalidError(place, f"must be {_expected(what, kind, steps)}, not {_shown(given, steps)}")


def _expected(what: str, kind: object, steps: list[str | int]) -> str:
    if what.startswith("Invalid enum value"):
        return _words_of(_type_at(kind, steps))
    if pattern := re.match(r"Expected `str` matching regex (.*)\Z", what, re.DOTALL):
        return DESCRIBED.get(pattern[1], f"text like {pattern[1]}")
    if limit := re.match(r"Expected `\w+` (>=|<=|>|<) (\S+)", what):
        return f"{LIMITS[limit[1]]} {limit[2].removesuffix('.0')}"
    if types := re.match(r"Expected `([^`]*)`", what):
        return " or ".join(KINDS.get(name, name) for name in types[1].split(" | "))
    return "a number that fits" if "out of range" in what else f"valid ({what})"


def _type_at(kind: object, steps: list[str | int]) -> object:
    """The type at a path inside `kind`."""
    for step in steps:
        inner = _without_none(kind)
        kind = get_args(inner)[0] if isinstance(step, int) else get_type_hints(inner)[step]
    return _without_none(kind)


def _without_none(kind: object) -> Any:  # noqa: ANN401 - a type
    if get_origin(kind) in (Union, UnionType):
        return next(each for each in get_args(kind) if each is not NoneType)
    return kind


def _words_of(kind: object) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return either([str(each.value) for each in kind])
    return "one of its words"


def _shown(given: object, steps: list[str | int]) -> str:
    """The value at a path, shortened, on one line."""
    value: Any = given
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return "that"
    return shortened(one_line(repr(value[: 2 * SHOWN] if isinstance(value, str | bytes) else value)), SHOWN)
