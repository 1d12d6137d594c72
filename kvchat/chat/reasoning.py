"""What a model thinks before it answers: `<think>…</think>`, told apart from the answer.

Splitting loses nothing: thinking and answer put together are the text again, letter by letter, because the
token ids of a saved answer stand for exactly that text.
"""

import re

OPEN, CLOSE = "<think>", "</think>"
TEMPLATE_OPENED = re.compile(r"(?P<thinking>(?:(?!<think>).)*?\n</think>[ \t]*\n+)", re.DOTALL)
"""Some templates write the opening tag themselves: then the text begins inside the thinking."""


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking with its tags and the blank lines after it, the rest); without thinking, nothing and `text`.

    A block that was never closed is thinking to its end.
    """
    start = len(text) - len(text.lstrip())
    if not text.startswith(OPEN, start):
        opened = TEMPLATE_OPENED.match(text) if CLOSE in text else None
        return (opened["thinking"], text[opened.end() :]) if opened else ("", text)
    closed = text.find(CLOSE, start)
    if closed < 0:
        return text, ""
    end = closed + len(CLOSE)
    end += len(text) - end - len(text[end:].lstrip())
    return text[:end], text[end:]


def inner_thinking(thinking: str) -> str:
    """What was thought, without the tags."""
    return thinking.strip().removeprefix(OPEN).removesuffix(CLOSE).strip()


class ThinkingStream:
    """Splits a text that comes in pieces."""

    def __init__(self) -> None:
        self.thinking = ""
        self._undecided = ""
        self._answering = False
        self._seen = 0
        """Characters of the thinking that were searched for its end."""

    @property
    def open(self) -> bool:
        """Whether the model still thinks."""
        return bool(self.thinking) and not self._answering

    def feed(self, piece: str) -> str:
        """The part of `piece` (and of what was held back before it) that belongs to the answer."""
        if self._answering:
            return piece
        if self.thinking:
            return self._think(piece)
        self._undecided += piece
        begun = self._undecided.lstrip()
        if begun.startswith(OPEN):
            held, self._undecided = self._undecided, ""
            return self._think(held)
        if OPEN.startswith(begun):
            return ""  # it may still become the tag
        return self.end()

    def end(self) -> str:
        """No more comes: what was held back belongs to the answer."""
        held, self._undecided = self._undecided, ""
        if not self.thinking:
            self.thinking, held = split_thinking(held)
        self._answering = True
        return held

    def _think(self, piece: str) -> str:
        self.thinking += piece
        closed = self.thinking.find(CLOSE, max(0, self._seen - len(CLOSE)))
        self._seen = len(self.thinking)
        if closed < 0:
            return ""
        self._answering = True
        self.thinking, answer = split_thinking(self.thinking)
        return answer
