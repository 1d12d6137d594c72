"""The card of the tour: what is about to happen, what happened, and how to go on."""

import asyncio
from collections.abc import Callable

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalGroup
from textual.content import Content
from textual.message import Message
from textual.widgets import Static
from textual.worker import Worker

from kvchat.errors import KvchatError
from kvchat.ui.tour import STEPS, Guide, Step

RUNS = "Enter runs it · Esc ends the tour"
RUNNING = "running … · Esc ends the tour"
NEXT = "Enter goes on · Esc ends the tour"
CLOSE = "Enter ends the tour: your own conversations come back, and this one is forgotten"
OVER = (
    "That was the tour. F5 shows a cache token by token, F6 why something was read again, F7 races the cache "
    "against none, F8 lists all caches."
)


class TourCard(VerticalGroup, can_focus=True):
    """Stands over the prompt while the tour lasts; it has the focus, so that Enter goes on."""

    BINDINGS = [Binding("enter,space", "go_on", "Go on"), Binding("escape", "end", "End the tour")]

    class Ended(Message):
        """The tour is over, or was left."""

    def __init__(self, guide: Guide, refresh_chat: Callable[[], None]) -> None:
        """`refresh_chat` shows what a step changed."""
        super().__init__(id="tour")
        self._guide = guide
        self._refresh_chat = refresh_chat
        self._step = 0
        self._told = False
        """Whether the step was done, and its figures are shown."""
        self._worker: Worker[None] | None = None

    def compose(self) -> ComposeResult:
        yield Static(classes="head")
        yield Static(classes="text")
        yield Static(classes="note")

    def on_mount(self) -> None:
        """Begins."""
        self._announce()
        self.focus()

    def action_go_on(self) -> None:
        """Runs the step, or goes to the next one."""
        if self._worker and self._worker.is_running:
            return
        if self._step >= len(STEPS):
            self.action_end()
        elif self._told:
            self._step += 1
            self._announce()
        else:
            self._worker = self.run_worker(self._run(STEPS[self._step]), exclusive=True)

    def action_end(self) -> None:
        """Leaves the tour, in whatever step."""
        if self._worker:
            self._worker.cancel()
        self.post_message(self.Ended())

    async def _run(self, step: Step) -> None:
        self._show(step.title, step.before, RUNNING)
        try:
            await step.act(self._guide)
        except KvchatError as error:
            self._show(step.title, str(error), "Enter tries it again · Esc ends the tour")
            return
        except asyncio.CancelledError:
            return
        self._told = True
        self._show(step.title, step.after(self._guide), NEXT)
        self._refresh_chat()
        self.focus()

    def _announce(self) -> None:
        self._told = False
        if self._step < len(STEPS):
            step = STEPS[self._step]
            self._show(step.title, step.before, RUNS)
        else:
            self._show("The end", OVER, CLOSE)

    def _show(self, title: str, text: str, hint: str) -> None:
        number = f"{self._step + 1} of {len(STEPS)} · " if self._step < len(STEPS) else ""
        style = "bold $text-success" if self._told else ""
        self.query_one(".head", Static).update(Content(f"tour · {number}{title}"))
        self.query_one(".text", Static).update(Content.assemble((text, style)))
        self.query_one(".note", Static).update(Content(hint))
