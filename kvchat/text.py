"""Makes untrusted text safe to display: answers, titles and logs may contain terminal escapes.

Used for display only; stored text is unchanged. Also parses and formats sizes.
"""

import math
import re
from collections.abc import Sequence

BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""Bidirectional control characters, which reorder displayed text."""
CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0), *BIDI) if code not in (0x09, 0x0A)}


def clean(text: str) -> str:
    """`text` without control characters (C0 except tab and newline, DEL, C1, bidirectional controls)."""
    return text.translate(CONTROLS)


def one_line(text: str) -> str:
    """`text` cleaned and on one line, for titles."""
    return " ".join(clean(text).split())


def shortened(text: str, characters: int) -> str:
    """`text` cut to at most `characters`, with an ellipsis where something was cut."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def either(words: Sequence[str]) -> str:
    """`a, b or c`, for at least one word."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def found_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern for any of these words, ignoring case."""
    return re.compile("|".join(map(re.escape, words)) or r"(?!)", re.IGNORECASE)


BEFORE, EXCERPT = 30, 90
"""Characters before the first match, and of the whole excerpt."""


def excerpt(text: str, words: Sequence[str]) -> str:
    """The text around the first match of any of these words, on one line."""
    found = found_pattern(words).search(text)
    start = max(0, found.start() - BEFORE) if found else 0
    return ("…" if start else "") + one_line(text[start : start + EXCERPT])


UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def parse_size(text: str) -> int:
    """Parses `2GB`, `512 MB` or `1e9` into bytes; 1 MB is 1,000,000 bytes.

    Raises:
        ValueError: not a number, negative, or not finite.
    """
    number = text.strip().lower().removesuffix("b").rstrip()
    unit = number[-1:] if number[-1:] in "kmg" else ""
    size = float(number.removesuffix(unit)) * UNITS[unit]
    if not 0 <= size < math.inf:
        raise ValueError(text)
    return int(size)


def megabytes(count: int) -> str:
    """Formats bytes as `31.0 MB` or `1.24 GB`."""
    if count >= 1_000_000_000:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB"
