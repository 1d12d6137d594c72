"""JSON as the standard has it: what is written never holds `NaN` or `Infinity`."""

import json
import math
from collections.abc import Mapping
from typing import Any

LONGEST_INT = 20
"""Digits of an integer that is read as one; a longer number is read as a float."""


def write_json(value: object, *, indent: int | None = None, readable: bool = False) -> str:
    """`value` as JSON; a number that is not finite becomes null.

    Args:
        readable: leaves letters beyond ASCII as they are; else they are escaped.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=not readable, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=not readable, allow_nan=False)


def read_json(text: str | bytes) -> Any:  # noqa: ANN401 - whatever is in it
    """What a JSON text holds; `NaN`, `Infinity` and endless numbers are read as floats, and checked later.

    Raises:
        ValueError, RecursionError: it is no JSON, or nested too deeply.
    """
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int | float:
    """Python refuses to read integers of thousands of digits, and nothing here can use more than 64 bits."""
    return int(digits) if len(digits) <= LONGEST_INT else float(digits)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
