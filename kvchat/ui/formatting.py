"""What a turn did with a cache, in words with colours. Plain values in, text out; no widgets, no engine."""

import re
from collections.abc import Mapping

from textual.content import Content

from kvchat.chat.wording import about, tokens
from kvchat.contract import Miss, TokenStatus
from kvchat.text import clean, one_line

FATES = {
    TokenStatus.REUSED: ("▒", "$text-success"),
    TokenStatus.READ: ("█", "$text-warning"),
    TokenStatus.WRITTEN: ("▓", "$text-primary"),
    TokenStatus.EVICTED: ("×", "$text-error"),
    TokenStatus.UNCACHED: ("·", "$text-muted"),
}
"""Glyph and colour of what a turn did with a token, wherever that is drawn."""
LOST_SPACE = re.compile(r"^ | $|(?<= ) | (?= )")
"""Spaces that the eye would miss: at the ends, and next to each other."""


def fate_words(counts: Mapping[TokenStatus, int]) -> str:
    """`reused 120 · read 4`: what the last turn did with a message."""
    return " · ".join(f"{fate} {count:,}" if count else fate.value for fate, count in counts.items())


def miss_words(miss: Miss | None, note: str = "") -> Content:
    """The last miss: the cause, the price, and the first token that differs in its place.

    Args:
        miss: None where nothing was missed, or where only a turn's figures are left of it.
        note: the last turn's own words about what it did not reuse.
    """
    if miss is None:
        return Content(one_line(note) or "Nothing was read again: the last turn reused all there was.")
    lines = [
        Content.assemble((one_line(miss.cause), "bold")),
        Content(f"\nRead again: {tokens(miss.tokens)}{about(miss.seconds)}."),
    ]
    if miss.token is not None:
        place = "the system prompt" if miss.message == 0 else f"message {miss.message}"
        lines += [
            Content(f"\nFirst difference: token {miss.token:,}, in {place}:"),
            in_place("cached  ", miss.before, miss.was, "$text-error strike"),
            in_place("now     ", miss.before, miss.now, "$text-success bold"),
        ]
    return Content("\n").join(lines)


def in_place(label: str, before: str, text: str, style: str) -> Content:
    """A piece of text after what stands before it."""
    lead = visible(before) if before else ""
    return Content.assemble((f"{label}{lead}", "$text-muted"), (visible(text), style))


def visible(text: str) -> str:
    """Text on one line in which line ends, tabs and spaces that matter can be seen."""
    shown = clean(text).replace("\n", "⏎").replace("\t", "⇥")
    return LOST_SPACE.sub("␣", shown) or "(nothing)"
