"""The problems of an import, each with its place in the file."""

from dataclasses import dataclass

from kvchat.text import one_line, shortened

TITLE = 40
"""Characters of a title in a report."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that was not imported as it is in the file."""

    what: str
    """What was wrong, and what the import did about it."""
    part: str = ""
    """The file inside a zip or a folder."""
    conversation: int = 0
    """Number in the file, from 1; 0 for the whole file."""
    title: str = ""
    message: int = 0
    """Number in the conversation, from 1; 0 for the whole conversation."""
    skipped: bool = False
    """Whether the whole conversation was not imported."""

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
    """Collects problems, with the place of the current conversation."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._part = ""
        self._number = 0
        self._title = ""

    def in_part(self, name: str) -> None:
        """Starts another file of a zip or folder."""
        self._part, self._number, self._title = name, 0, ""

    def begin(self) -> None:
        """Starts the next conversation of the file."""
        self._number += 1
        self._title = ""

    def name(self, title: object) -> None:
        """Sets the title of the current conversation; any other type than text is ignored."""
        self._title = shortened(one_line(title[: 4 * TITLE]), TITLE) if isinstance(title, str) else ""

    def note(self, what: str, message: int = 0) -> None:
        """Reports something that was left out or replaced."""
        self._add(what, message, skipped=False)

    def skip(self, why: str) -> None:
        """Reports that the current conversation is not imported."""
        self._add(f"{why}; it was skipped", 0, skipped=True)

    def _add(self, what: str, message: int, *, skipped: bool) -> None:
        problem = Problem(what, self._part, self._number, self._title, message, skipped)
        self.problems.append(problem)
