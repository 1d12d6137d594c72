"""Draws the state around the transcript: panel, status, strip, title and the list of conversations."""

import time
from typing import TYPE_CHECKING

from textual.content import Content
from textual.timer import Timer
from textual.widgets import Static

from kvchat.errors import KvchatError
from kvchat.text import one_line
from kvchat.ui.widgets.conversations import ConversationList
from kvchat.ui.widgets.panel import CachePanel
from kvchat.ui.widgets.status import StatusLine
from kvchat.ui.widgets.strip import ReuseStrip, beside
from kvchat.ui.widgets.welcome import Welcome

if TYPE_CHECKING:
    from kvchat.ui.screens.chat import ChatScreen

SOON_S = 0.01
"""Not 0: Textual divides by a timer's seconds where the timer comes late, as on a busy machine."""
PANEL_EVERY_S = 1.0
"""The figures are drawn this often at most while an answer streams."""


class StateView:
    """Draws at once, or a moment later where much happens."""

    def __init__(self, screen: "ChatScreen") -> None:
        self._screen = screen
        self._timer: Timer | None = None
        self._drawn_at = 0.0
        """When the figures were drawn last, on the monotonic clock."""

    def draw_figures(self) -> None:
        """Draws the figures of the panel, the status and the strip."""
        if self._timer:
            self._timer.stop()
        self._timer, self._drawn_at = None, time.monotonic()
        screen, controller = self._screen, self._screen.controller
        state, session = controller.refresh(), controller.session
        doing = "writing, Esc stops" if state.active and state.model else state.status
        screen.query_one(CachePanel).show(state)
        screen.query_one(StatusLine).show(state, doing)
        screen.query_one(ReuseStrip).show(beside(session.current, session.last_turn))
        for welcome in screen.query(Welcome):
            welcome.ready = state.model is not None

    def draw_figures_soon(self) -> None:
        """Draws the figures when they are due again."""
        if self._timer is None:
            wait = PANEL_EVERY_S - (time.monotonic() - self._drawn_at)
            self._timer = self._screen.set_timer(max(SOON_S, wait), self.draw_figures)

    def draw(self) -> None:
        """Draws everything."""
        self.draw_figures()
        screen, controller = self._screen, self._screen.controller
        session, current = controller.session, controller.session.current
        private = "private, nothing is written · " if session.is_private(current.id) else ""
        title = f"{private}{one_line(current.title) or 'new conversation'}"
        screen.query_one("#title", Static).update(Content(title))
        try:
            summaries = session.conversations()
        except KvchatError as error:
            screen.say(str(error))
            return
        screen.query_one(ConversationList).show(summaries, controller.state.caches, current.id)
        screen.query_one("#none-yet").display = not summaries
        screen.inspectors.show_pool()
