"""What an import left out or replaced, with its place in the file."""

from dataclasses import dataclass

from kvchat.text import one_line

TITLE = 40
"""Characters of a title in a report."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a file that did not come in as it stands there."""

    what: str
    """What was wrong, and what was done."""
    part: str = ""
    """The file inside a zip or a folder."""
    conversation: int = 0
    """Place in the file, from 1; 0 is the file as a whole."""
    title: str = ""
    message: int = 0
    """Place in the conversation, from 1; 0 is the conversation as a whole."""
    skipped: bool = False
    """Whether the whole conversation did not come in."""

    def __str__(self) -> str:
        """One line: `conversations-001.json, conversation 2 "Tea", message 3: text must be text, not 5`."""
        places = [self.part] if self.part else []
        if self.conversation:
            title = f' "{self.title}"' if self.title else ""
            places.append(f"conversation {self.conversation:,}{title}")
        if self.message:
            places.append(f"message {self.message:,}")
        place = ", ".join(places)
        return one_line(f"{place}: {self.what}" if place else self.what)


class Report:
    """Collects problems; knows which conversation is being read."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._part = ""
        self._number = 0
        self._title = ""

    def in_part(self, name: str) -> None:
        """The conversations of another file come now."""
        self._part, self._number, self._title = name, 0, ""

    def begin(self) -> None:
        """The next conversation of the file comes now."""
        self._number += 1
        self._title = ""

    def name(self, title: object) -> None:
        """The title of the conversation, where it has one."""
        shown = one_line(title[: 4 * TITLE]) if isinstance(title, str) else ""
        self._title = shown if len(shown) <= TITLE else shown[: TITLE - 1] + "…"

    def note(self, what: str, message: int = 0) -> None:
        """Something was left out or replaced, and the rest of the conversation comes in."""
        self._add(what, message, skipped=False)

    def skip(self, why: str) -> None:
        """The conversation does not come in."""
        self._add(f"{why}; it was skipped", 0, skipped=True)

    def _add(self, what: str, message: int, *, skipped: bool) -> None:
        problem = Problem(what, self._part, self._number, self._title, message, skipped)
        self.problems.append(problem)
