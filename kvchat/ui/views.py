"""Opens the screens that look into the cache.

It knows which session, turns and desk they look at; what they draw is theirs.
"""

from textual.app import App

from kvchat.contract import Inspect
from kvchat.session import Session
from kvchat.ui.desk import CacheDesk
from kvchat.ui.screens.map import MapScreen
from kvchat.ui.turns import Turns


class Views:
    """What a user can open to see what a cache does."""

    def __init__(self, app: App[None], session: Session, turns: Turns, desk: CacheDesk) -> None:
        self._app = app
        self._session = session
        self._turns = turns
        self._desk = desk

    def map(self) -> None:
        """The cache of the open conversation, token by token."""
        request = self._session.request_as_if() if self._session.current.messages else None
        self._app.push_screen(MapScreen(request, lambda asked: self._desk.act(Inspect(asked)), self._title))

    def _title(self, conversation: str) -> str:
        titles = {summary.id: summary.title for summary in self._session.conversations()}
        return titles.get(conversation) or "untitled"
