"""Opens the screens that look into the cache; each is imported when it is opened first.

It knows the controller that they look at; what they draw is theirs.
"""

import secrets
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from kvchat.chat.cache_commands import budget
from kvchat.contract import CacheMode, Inspect, TurnRequest, Warm
from kvchat.errors import KvchatError
from kvchat.ui.compare import UNCACHED_TOKENS, without_cache

if TYPE_CHECKING:
    from kvchat.ui.screens.caches import CachesScreen
    from kvchat.ui.screens.chat import ChatScreen
    from kvchat.ui.tour import Guide

SEEDS = 1 << 31


class Inspectors:
    """What a user can open to see what a cache does."""

    def __init__(self, screen: "ChatScreen") -> None:
        self._screen = screen
        self._app = screen.app
        self._controller = screen.controller
        self._session = screen.controller.session
        self._guide: Guide | None = None
        self._caches: CachesScreen | None = None
        """The list of caches that was opened last."""

    def map(self) -> None:
        """The cache of the open conversation, token by token."""
        from kvchat.ui.screens.cache_map import MapScreen

        request = self._session.request_as_if() if self._session.current.sent else None
        engine = self._controller.engine
        self._app.push_screen(MapScreen(request, lambda asked: engine.command(Inspect(asked)), self._title))

    def timeline(self, conversation: str = "") -> None:
        """Everything that happened to a cache; that of the open conversation without a name."""
        from kvchat.ui.screens.timeline import TimelineScreen

        title = self._title(conversation or self._session.current.id)
        self._app.push_screen(TimelineScreen(title, self._session.events(conversation)))

    def caches(self) -> None:
        """Every cache, and what can be done to it."""
        from kvchat.ui.screens.caches import CachesScreen

        summaries, pool = self._session.conversations(), self._controller.state.pool
        ask_budget = partial(budget, self._controller, "")
        screen = CachesScreen(summaries, pool, self._controller.engine.command, ask_budget, self.timeline)
        self._caches = screen
        self._app.push_screen(screen)

    def show_pool(self) -> None:
        """Shows the caches as they are now, where the list of them is open."""
        if self._caches in self._app.screen_stack:  # one that was left stays mounted, without a table
            self._caches.show(self._controller.state.pool)

    async def compare(self, text: str) -> None:
        """A question with and without a cache: the given one, the one in the prompt, or the last one."""
        prompt = self._screen.prompt
        typed = "" if text else prompt.text
        prompt.text = prompt.text.removeprefix(typed)
        self._screen.save_draft()
        try:
            await self._race(text or typed.strip())
        except KvchatError:
            prompt.give_back(typed)
            raise

    async def _race(self, text: str) -> None:
        """The same prompt with and without a cache; a new question is asked, and its answer kept.

        Without a `text`, the last question is answered again, twice, and the conversation stays as it is.

        Raises:
            KvchatError: an answer is under way, or nothing was asked yet.
        """
        if self._controller.answering:
            raise KvchatError("An answer is still being written. Esc stops it.")
        from kvchat.ui.screens.compare import RaceScreen

        engine = self._controller.engine
        scratch = f"race-{secrets.token_hex(4)}"
        again = None if text else self._again(scratch)
        screen = RaceScreen(
            run=engine.submit,
            stop=engine.stop,
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
            engine.submit(again)

    async def tour(self) -> None:
        """The tour, in a conversation that is not saved."""
        from kvchat.ui.tour import Guide
        from kvchat.ui.widgets.tour_card import TourCard

        screen = self._screen
        if screen.query(TourCard):
            return
        screen.save_draft()
        self._guide = Guide.begin(self._controller)
        await self._controller.opened()
        card = TourCard(self._guide, screen.refresh_all)
        await screen.query_one("#middle").mount(card, before=screen.prompt)

    def end_tour(self) -> None:
        """Brings the conversations back, if there is a tour; nothing of it stays."""
        guide, self._guide = self._guide, None
        if guide:
            self._controller.stop()
            guide.end()

    async def _ask(self, text: str) -> TurnRequest:
        """Asks in the open conversation, with a seed that the run without a cache can have too."""
        before = self._session.current
        seed = before.sampling.seed if before.sampling.seed is not None else secrets.randbelow(SEEDS)
        self._session.configure(mode=CacheMode.ON, sampling=replace(before.sampling, seed=seed))
        try:
            return await self._controller.send(text)
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
        held = self._controller.state.caches.get(request.conversation)
        if held and not held.hot:
            self._controller.engine.command(Warm(request.conversation, request.kv))
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
            self._controller.engine.forget(conversation)

    def _title(self, conversation: str) -> str:
        return self._controller.title_of(conversation) or "untitled"
