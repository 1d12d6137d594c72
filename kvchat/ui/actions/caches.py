"""What is done with KV caches, and what shows them."""

from kvchat.contract import CacheMode
from kvchat.errors import KvchatError
from kvchat.ui.actions.base import ActionBase
from kvchat.ui.formatting import miss_words


class CacheActions(ActionBase):
    """Acts on caches and looks into them."""

    def action_cache(self, mode: str = "") -> None:
        """Sets the cache mode, or takes the next one."""
        modes = list(CacheMode)
        following = modes[(modes.index(self._session.current.mode) + 1) % len(modes)]
        if mode and mode not in set(CacheMode):
            self._say(f"The cache modes are on, turn and off; not {mode}.")
            return
        with self._telling():
            self._session.configure(mode=CacheMode(mode) if mode else following)
        self._refresh_all()

    def action_why(self) -> None:
        """Explains the last miss."""
        from kvchat.ui.screens.dialogs import Explanation

        figures = self._turns.figures
        why = miss_words(figures.last_miss, figures.state.turn.reuse_note)
        self.app.push_screen(Explanation("Why was something read again?", why))

    def action_map(self) -> None:
        """Shows the cache token by token."""
        self._views.map()

    def action_timeline(self) -> None:
        """Shows what happened to the cache of this conversation."""
        with self._telling():
            self._views.timeline()

    async def action_compare(self, text: str = "") -> None:
        """Answers with and without the cache, side by side; takes what stands in the prompt."""
        typed = "" if text else self._prompt.text
        self._prompt.text = self._prompt.text.removeprefix(typed)
        self._save_draft()
        try:
            await self._views.race(text or typed.strip())
        except KvchatError as error:
            self._prompt.give_back(typed)
            self._say(str(error))
        self._refresh_all()

    async def action_tour(self) -> None:
        """Begins the tour, in a conversation that is not saved."""
        from kvchat.ui.widgets.tour_card import TourCard

        with self._telling():
            if self.query(TourCard):
                return
            self._save_draft()
            guide = self._views.tour()
            await self._opened()
            await self.query_one("#middle").mount(TourCard(guide, self._refresh_all), before=self._prompt)

    async def on_tour_card_ended(self) -> None:
        """Goes back to the conversations."""
        await self.query("#tour").remove()
        with self._telling():
            self._views.end_tour()
            await self._opened()
            self._prompt.focus()

    def action_caches(self) -> None:
        """Shows every cache."""
        with self._telling():
            self._views.caches(self.action_budget)

    def action_policy(self, name: str = "") -> None:
        """Chooses what is dropped when the context is full."""
        with self._telling():
            self._desk.policy(name)
            self._refresh_figures()

    def action_kv(self, name: str = "") -> None:
        """Stores keys and values in another precision."""
        with self._telling():
            self._desk.precision(name)

    def action_budget(self, size: str = "") -> None:
        """Changes how much memory all caches may take."""
        from kvchat.ui.screens.dialogs import AskLine

        if size:
            self._desk.budget(size)
        else:
            question = "Memory for all KV caches, such as 2GB or 512MB"
            self.app.push_screen(AskLine(question), lambda given: self._desk.budget(given) if given else None)
