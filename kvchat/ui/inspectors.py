"""Opens the screens that look into the cache; each is imported when it is opened first.

It knows which session, turns and desk they look at; what they draw is theirs.
"""

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from textual.app import App

from kvchat.chat.session import Session
from kvchat.contract import CacheMode, EvictionPolicy, Inspect, KVPrecision, TurnRequest, Warm
from kvchat.errors import KvchatError
from kvchat.ui.cache_actions import CacheDesk
from kvchat.ui.compare import UNCACHED_TOKENS, without_cache
from kvchat.ui.turn_presenter import Turns
from kvchat.ui.turn_thread import EngineBridge

if TYPE_CHECKING:
    from kvchat.ui.screens.caches import CachesScreen
    from kvchat.ui.tour import Guide

SEEDS = 1 << 31


class Views:
    """What a user can open to see what a cache does."""

    def __init__(
        self, app: App[None], session: Session, bridge: EngineBridge, turns: Turns, desk: CacheDesk
    ) -> None:
        self._app = app
        self._bridge = bridge
        self._session = session
        self._turns = turns
        self._desk = desk
        self._guide: Guide | None = None
        self._caches: CachesScreen | None = None
        """The list of caches that was opened last."""

    def map(self) -> None:
        """The cache of the open conversation, token by token."""
        from kvchat.ui.screens.cache_map import MapScreen

        request = self._session.request_as_if() if self._session.current.sent else None
        self._app.push_screen(
            MapScreen(request, lambda asked: self._desk.command(Inspect(asked)), self._title)
        )

    def timeline(self, conversation: str = "") -> None:
        """Everything that happened to a cache; that of the open conversation without a name."""
        from kvchat.ui.screens.timeline import TimelineScreen

        title = self._title(conversation or self._session.current.id)
        self._app.push_screen(TimelineScreen(title, self._session.events(conversation)))

    def caches(self, ask_budget: Callable[[], None]) -> None:
        """Every cache, and what can be done to it."""
        from kvchat.ui.screens.caches import CachesScreen

        summaries = self._session.conversations()
        screen = CachesScreen(summaries, self._turns.pool, self._desk.command, ask_budget, self.timeline)
        self._caches = screen
        self._app.push_screen(screen)

    def show_pool(self) -> None:
        """Shows the caches as they are now, where the list of them is open."""
        if self._caches in self._app.screen_stack:  # one that was left stays mounted, without a table
            self._caches.show(self._turns.pool)

    async def race(self, text: str) -> None:
        """The same prompt with and without a cache; a new question is asked, and its answer kept.

        Without a `text`, the last question is answered again, twice, and the conversation stays as it is.

        Raises:
            KvchatError: an answer is under way, or nothing was asked yet.
        """
        if self._turns.answering:
            raise KvchatError("An answer is still being written. Esc stops it.")
        from kvchat.ui.screens.compare import RaceScreen

        scratch = f"race-{secrets.token_hex(4)}"
        again = None if text else self._again(scratch)
        screen = RaceScreen(
            run=self._bridge.run_turn,
            stop=self._bridge.stop,
            forget=lambda: self._forget(scratch, f"{scratch}-off"),
            kept=bool(text),
        )
        await self._app.push_screen(screen)
        try:
            cached = again or await self._ask(text)
        except KvchatError:
            screen.dismiss()
            raise
        screen.begin(cached, without_cache(cached, secrets.token_hex(8), f"{scratch}-off"))
        if again:
            self._bridge.run_turn(again)

    def tour(self) -> "Guide":
        """Sets the conversations aside and opens an empty one for the tour.

        Raises:
            KvchatError: an answer is under way.
        """
        from kvchat.ui.tour import Guide

        self._session.aside()
        self._session.configure(
            mode=CacheMode.ON, system_prompt="", kv=KVPrecision.AUTO, policy=EvictionPolicy.TURNS
        )
        self._guide = Guide(self._session, self._bridge, self._turns, self._desk)
        return self._guide

    def end_tour(self) -> None:
        """Brings the conversations back, if there is a tour; nothing of it stays."""
        if self._guide is None:
            return
        self._turns.stop()
        self._guide.restore_budget()
        self._guide = None
        self._turns.forget(self._session.back())

    async def _ask(self, text: str) -> TurnRequest:
        """Asks in the open conversation, with a seed that the run without a cache can have too."""
        before = self._session.current
        seed = before.sampling.seed if before.sampling.seed is not None else secrets.randbelow(SEEDS)
        self._session.configure(mode=CacheMode.ON, sampling=replace(before.sampling, seed=seed))
        try:
            return await self._turns.send(text)
        finally:
            self._session.configure(mode=before.mode, sampling=before.sampling)

    def _again(self, scratch: str) -> TurnRequest:
        """The last question for a conversation of its own, which borrows the cache of the open one."""
        messages = self._session.current.prompt()
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1].role != "user":
            raise KvchatError("Write a question first, or /cache compare QUESTION.")
        request = self._session.request_as_if(messages=messages)
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbelow(SEEDS)
        few = min(request.sampling.max_tokens, UNCACHED_TOKENS)
        held = self._turns.warm.get(request.conversation)
        if held and not held.hot:
            self._desk.command(Warm(request.conversation, request.kv))
        return replace(
            request,
            turn=secrets.token_hex(8),
            conversation=scratch,
            mode=CacheMode.ON,
            sampling=replace(request.sampling, seed=seed, max_tokens=few),
            persist=False,
        )

    def _forget(self, *conversations: str) -> None:
        for conversation in conversations:
            self._bridge.forget(conversation)

    def _title(self, conversation: str) -> str:
        titles = {summary.id: summary.title for summary in self._session.conversations()}
        return titles.get(conversation) or "untitled"
