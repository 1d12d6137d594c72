"""What every action of the chat stands on: the session and who works with it, and how all is drawn again.

The actions are in modules of their own, by topic; the screen itself composes and routes. What opens over the
chat is imported where it is opened: the first paint waits for none of it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from textual.content import Content
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Static

from kvchat.chat.session import Session
from kvchat.errors import KvchatError
from kvchat.models.cards import load_cards
from kvchat.text import clean, one_line
from kvchat.ui.commands import remapped
from kvchat.ui.preferences import Preferences
from kvchat.ui.themes import NAMES
from kvchat.ui.turn_thread import EngineBridge, EngineFactory
from kvchat.ui.widgets.completions import Completions
from kvchat.ui.widgets.conversations import ConversationList
from kvchat.ui.widgets.panel import CachePanel
from kvchat.ui.widgets.prompt import Prompt
from kvchat.ui.widgets.status import StatusLine
from kvchat.ui.widgets.strip import ReuseStrip, beside
from kvchat.ui.widgets.welcome import Welcome

if TYPE_CHECKING:
    from kvchat.ui.cache_actions import CacheDesk
    from kvchat.ui.conversation_files import Archive
    from kvchat.ui.inspectors import Views
    from kvchat.ui.model_switch import ModelDesk, ModelShelf
    from kvchat.ui.prompt_cost import Reckoner
    from kvchat.ui.turn_presenter import Turns


class ActionBase(Screen[None]):
    """Holds who works together; all but the widgets comes with the session, after the first paint."""

    _session: Session
    _turns: "Turns"
    _desk: "CacheDesk"
    _views: "Views"
    _archive: "Archive"
    _reckoner: "Reckoner"
    _models: "ModelDesk"
    """Only where there is a shelf."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        factory: EngineFactory,
        model: str,
        preferences: Preferences,
        shelf: "ModelShelf | None",
    ) -> None:
        """Without a `shelf` there is one model, and no other to choose."""
        super().__init__()
        self._open_session = open_session
        self._preferences = preferences
        self._shelf = shelf
        self._commands = remapped(preferences.keys)
        self._begun = False
        """Whether the session is open; until then there is nothing to act on."""
        self._has_left = False
        self._model = model
        self.first_command = ""
        """What is done as soon as the session is open."""
        self._bridge = EngineBridge(factory, self)
        self._completions = Completions(self._words)
        self._prompt = Prompt(self._completions)
        self._draft_timer: Timer | None = None
        self._reckon_timer: Timer | None = None
        self._figures_timer: Timer | None = None
        self._figures_at = 0.0
        """When the figures were drawn last, on the monotonic clock."""

    @property
    def answering(self) -> bool:
        """Whether an answer is under way."""
        return self._begun and self._turns.answering is not None

    def _words(self) -> Mapping[str, Sequence[str]]:
        """Words that the arguments of commands may be, where the commands themselves can't know."""
        return {"theme": NAMES, "model": [card.name for card in load_cards()] if self._shelf else ()}

    def _stop_in(self, conversation: str) -> None:
        """Stops the answer under way if it belongs to that conversation."""
        answering = self._turns.answering
        if answering and answering.conversation == conversation:
            self._turns.stop()

    async def _opened(self, typed: str = "") -> None:
        self._prompt.text = self._session.draft() + typed
        self._prompt.move_cursor(self._prompt.document.end)
        await self._turns.show_conversation()
        self._desk.opened()
        if self._shelf:
            self._models.opened()
        self._refresh_all()

    def _reckon(self) -> None:
        self._reckoner.typed(self._prompt.message, self._turns.editing)

    def _save_draft(self) -> None:
        with self._telling():
            self._session.save_draft(self._prompt.message)

    def _toggle(self, part: str, shown: bool | None = None) -> None:
        widget = self.query_one(f"#{part}")
        shown = not widget.display if shown is None else shown
        if shown and (self.has_class("-medium") or self.has_class("-narrow", "-short")):
            # there is room for one of them beside the words
            self.remove_class("show-side", "show-panel")
        self.set_class(shown, f"show-{part}")
        self.set_class(not shown, f"hide-{part}")

    def _refresh_figures(self) -> None:
        if self._figures_timer:
            self._figures_timer.stop()
        self._figures_timer, self._figures_at = None, time.monotonic()
        self._turns.figures.settings(self._session.current.mode, self._session.current.policy)
        state = self._turns.figures.state
        doing = "writing, Esc stops" if self._turns.answering and state.model else self._turns.status
        self.query_one(CachePanel).show(state)
        self.query_one(StatusLine).show(state, doing, self._model)
        self.query_one(ReuseStrip).show(beside(self._session.current, self._session.last_turn))
        for welcome in self.query(Welcome):
            welcome.ready = state.model is not None

    def _refresh_all(self) -> None:
        self._refresh_figures()
        current = self._session.current
        private = "private, nothing is written · " if self._session.is_private(current.id) else ""
        title = f"{private}{one_line(current.title) or 'new conversation'}"
        self.query_one("#title", Static).update(Content(title))
        summaries = self._session.conversations()
        self.query_one(ConversationList).show(summaries, self._turns.warm, current.id)
        self.query_one("#none-yet").display = not summaries
        self._views.show_pool()

    def _confirm(self, question: str, yes: str, act: Callable[[], None]) -> None:
        from kvchat.ui.screens.dialogs import Confirm

        def answered(sure: bool | None) -> None:
            if sure:
                with self._telling():
                    act()
                    self._refresh_all()

        self.app.push_screen(Confirm(question, yes), answered)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside the block, what goes wrong for a reason is told and ends nothing."""
        try:
            yield
        except KvchatError as error:
            self._say(str(error))

    def _say(self, text: str) -> None:
        self.notify(clean(text), markup=False)
