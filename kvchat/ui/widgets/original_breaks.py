"""What was one line before the screen was too narrow for it: copied text has the breaks its author made.

Rich tells nobody where it wrapped a line. So the same text is drawn once more with room enough, and the lines
are laid beside each other. Works on lines of text. Must not depend on Markdown or widgets.
"""

import re
from collections.abc import Sequence

BREAK = "\n"
INDENT = re.compile(r"\s*(?:▌\s+)*")
"""Before a line that goes on: blanks, and the bars with which quotes are drawn."""


def joints_of(lines: Sequence[str], whole: Sequence[str]) -> list[str]:
    """What stands after each of `lines`: a line break, or a blank or nothing where the next one goes on.

    Args:
        lines: as they are on the screen.
        whole: the same text with nothing wrapped. Where it is laid out otherwise (columns of a table, wrapped
            each for itself), every line ends with a break.
    """
    found: list[str] = []
    for line in whole:
        parts = _joints(lines[len(found) :], line)
        if parts is None:
            return [BREAK] * len(lines)
        found += parts
    return found if len(found) == len(lines) else [BREAK] * len(lines)


def _joints(lines: Sequence[str], whole: str) -> list[str] | None:
    """What stands after each line that `whole` became; None where these are others."""
    rest, found = whole.strip(), list[str]()
    for line in lines:
        part = (INDENT.sub("", line, count=1) if found else line).strip()
        if not rest.startswith(part) or (rest and not part):
            return None
        rest = rest[len(part) :]
        if not rest:
            return [*found, BREAK]
        found.append(" " if rest[0].isspace() else "")
        rest = rest.lstrip()
    return None


def joined(parts: Sequence[str], joints: Sequence[str]) -> str:
    """Parts of neighbouring lines as one text; a joint stands after each. What goes on loses its indent,
    and its bars where it is a quote."""
    text, before = "", BREAK
    for part, joint in zip(parts, joints, strict=True):
        text += (part if before == BREAK else INDENT.sub("", part, count=1)) + joint
        before = joint
    return text.removesuffix(before)
