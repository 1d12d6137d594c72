"""The reuse strip: in the gutter beside every message, what the last turn did with its tokens.

It looks where the messages of a transcript stand on the screen and draws beside them; what stands in them,
and how they came to be there, is not its business.
"""

from collections.abc import Sequence
from itertools import pairwise

from textual import events
from textual.containers import ScrollableContainer
from textual.content import Content
from textual.widget import Widget

from kvchat.chat.conversation import Conversation
from kvchat.chat.token_status import ANSWER, Counts, TokenStatuses
from kvchat.contract import TokenStatus
from kvchat.ui.formatting import FATES, fate_words


def beside(conversation: Conversation, statuses: TokenStatuses) -> list[Counts]:
    """What was done with every message on the screen, and with the answer that is not one of them yet."""
    return [statuses.get(message, {}) for message in (*(m.id for m in conversation.messages), ANSWER)]


def column(counts: Counts, lines: int) -> list[TokenStatus]:
    """A fate for each line of a message, top to bottom; each has a line, as far as the lines reach."""
    if not counts or lines < 1:
        return []
    shown = [fate for fate in TokenStatus if fate in counts]
    if len(shown) > lines:
        shown = sorted(shown, key=lambda fate: counts[fate], reverse=True)[:lines]
    total = sum(counts[fate] for fate in shown)
    free = lines - len(shown)
    marks, done = [0], 0
    for number, fate in enumerate(shown, start=1):
        done += counts[fate]
        marks.append(number + (round(done * free / total) if total else free))
    return [
        fate for fate, (start, end) in zip(shown, pairwise(marks), strict=True) for _ in range(end - start)
    ]


class ReuseStrip(Widget):
    """Draws beside the messages of a transcript, and follows it when it scrolls or grows."""

    def __init__(self, transcript: ScrollableContainer) -> None:
        super().__init__(id="strip")
        self._transcript = transcript
        self._counts: Sequence[Counts] = ()
        self._column: list[TokenStatus | None] = []

    def on_mount(self) -> None:
        """Follows every layout of the screen: scrolling and growing are some, too."""
        self.screen.screen_layout_refresh_signal.subscribe(self, lambda _screen: self._redraw())

    def show(self, counts: Sequence[Counts]) -> None:
        """Draws other figures: one entry for each message of the conversation, by its place."""
        if list(counts) != list(self._counts):
            self._counts = counts
            self._redraw()

    def _redraw(self) -> None:
        self._stand_beside([message for message, _ in self._messages()])
        column = self._lines()
        if column != self._column:
            self._column = column
            self.refresh()

    def _stand_beside(self, messages: Sequence[Widget]) -> None:
        """Moves to the column left of the messages: in a wide terminal they don't begin at the edge."""
        lefts = [message.region.x for message in messages if message.region]
        if lefts:
            column = max(0, min(lefts) - 1 - self._transcript.region.x)
            if self.styles.offset.x.value != column:
                self.styles.offset = (column, 0)

    def _lines(self) -> list[TokenStatus | None]:
        """What to draw on each line of the screen."""
        height = self.size.height
        lines: list[TokenStatus | None] = [None] * height
        for message, counts in self._messages():
            first = self._first_line(message)
            for line, fate in enumerate(column(counts, message.region.height), start=first):
                if 0 <= line < height:
                    lines[line] = fate
        return lines

    def _first_line(self, message: Widget) -> int:
        """The line beside which a message begins."""
        return message.region.y - self.region.y

    def _messages(self) -> list[tuple[Widget, Counts]]:
        """The mounted messages, with what was done to them."""
        messages = [child for child in self._transcript.children if child.has_class("message")]
        placed = [(message, getattr(message, "place", -1)) for message in messages]
        return [(w, self._counts[place]) for w, place in placed if 0 <= place < len(self._counts)]

    def render(self) -> Content:
        """A glyph in its colour on every line beside a message."""
        drawn = ((" ", "") if fate is None else FATES[fate] for fate in self._column)
        return Content("\n").join(Content.assemble(each) for each in drawn)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Says beside which message the mouse is."""
        beside = (
            counts
            for message, counts in self._messages()
            if 0 <= event.y - self._first_line(message) < message.region.height
        )
        self.tooltip = fate_words(next(beside, {})) or None
