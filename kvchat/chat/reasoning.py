"""Separates a model's reasoning, `<think>…</think>`, from its answer.

Splitting is lossless: thinking + answer is exactly the text, because the saved token ids encode that text.
"""

import re

OPEN, CLOSE = "<think>", "</think>"
TEMPLATE_OPENED = re.compile(r"(?P<thinking>(?:(?!<think>).)*?\n</think>[ \t]*\n+)", re.DOTALL)
"""Thinking without opening tag: some templates write that tag themselves."""


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking with its tags and following blank lines, the rest); ("", `text`) without thinking.

    Without a closing tag, all of the text is thinking.
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
    """The thinking without its tags."""
    return thinking.strip().removeprefix(OPEN).removesuffix(CLOSE).strip()


class ThinkingStream:
    """Splits text that arrives in pieces."""

    def __init__(self) -> None:
        self.thinking = ""
        self._pending = ""
        """Text that may still become the opening tag."""
        self._answering = False
        self._searched = 0
        """Characters of the thinking already searched for the closing tag."""

    @property
    def open(self) -> bool:
        """Whether the model still thinks."""
        return bool(self.thinking) and not self._answering

    def feed(self, piece: str) -> str:
        """Takes the next piece; returns the part of it, and of pending text, that belongs to the answer."""
        if self._answering:
            return piece
        if self.thinking:
            return self._think(piece)
        self._pending += piece
        start = self._pending.lstrip()
        if start.startswith(OPEN):
            pending, self._pending = self._pending, ""
            return self._think(pending)
        if OPEN.startswith(start):
            return ""
        return self.end()

    def end(self) -> str:
        """Ends the text; returns the pending part of the answer."""
        pending, self._pending = self._pending, ""
        if not self.thinking:
            self.thinking, pending = split_thinking(pending)
        self._answering = True
        return pending

    def _think(self, piece: str) -> str:
        self.thinking += piece
        closed = self.thinking.find(CLOSE, max(0, self._searched - len(CLOSE)))
        self._searched = len(self.thinking)
        if closed < 0:
            return ""
        self._answering = True
        self.thinking, answer = split_thinking(self.thinking)
        return answer
