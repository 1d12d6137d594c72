"""Standard JSON: never writes `NaN` or `Infinity`."""

import json
import math
from collections.abc import Mapping
from typing import Any

LONGEST_INT = 20
"""Integers with more digits are read as floats."""


def write_json(value: object, *, indent: int | None = None, readable: bool = False) -> str:
    """`value` as JSON; a number that is not finite becomes null.

    Args:
        readable: write characters beyond ASCII unescaped.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=not readable, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=not readable, allow_nan=False)


def read_json(text: str | bytes) -> Any:  # noqa: ANN401 - whatever is in it
    """Parses JSON; `NaN`, `Infinity` and very long integers become floats, for validation to reject.

    Raises:
        ValueError, RecursionError: invalid JSON, or nested too deeply.
    """
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int | float:
    """Python refuses integers of thousands of digits; nothing here uses more than 64 bits."""
    return int(digits) if len(digits) <= LONGEST_INT else float(digits)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
