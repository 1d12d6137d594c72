"""F7: the same prompt with the cache and without it, side by side.

The engine answers one turn at a time, so the two run one after the other, and the screen says so: the first
is shown live, and again beside the second one, both from the same start.
"""

import time
from collections.abc import Callable

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from kvchat.contract import Status, TurnEvent, TurnFailed, TurnFinished, TurnRequest, TurnStarted
from kvchat.text import clean
from kvchat.ui.compare import WITH, WITHOUT, Lane, lane_words, plot, verdict
from kvchat.ui.engine_listener import Heard, Listener

DRAWN_EVERY_S = 0.15
PLOT_ROWS = 6
NAMES = (f"{WITH} with the cache", f"{WITHOUT} without")
STYLES = ("$text-success", "$text-error")
FIRST = "The two run one after the other, since the model takes one turn at a time. First: with the cache."
SECOND = "Now without the cache, live on the right; on the left the first run again, from the same start."
KEPT = "The conversation keeps the answer with the cache."
UNCHANGED = "The conversation keeps the answer it had."


class Column(Vertical):
    """One run: its figures, and what it wrote."""

    def __init__(self, name: str, style: str) -> None:
        super().__init__(classes="lane")
        self._title = Content.assemble((name, f"bold {style}"))

    def compose(self) -> ComposeResult:
        yield Static(self._title)
        yield Static(classes="figures")
        with VerticalScroll(can_focus=False):
            yield Static(classes="text")

    def show(self, figures: str, text: str) -> None:
        """Draws both."""
        self.query_one(".figures", Static).update(Content.assemble((figures, "$text-muted")))
        self.query_one(".text", Static).update(Content(clean(text)))
        self.query_one(VerticalScroll).scroll_end(animate=False)


class RaceScreen(Listener, ModalScreen[None]):
    """Runs the second turn when the first one is over, and draws both."""

    BINDINGS = [Binding("escape,f7,q", "leave", "Back")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (28, "-tall")]

    def __init__(
        self,
        *,
        run: Callable[[TurnRequest], None],
        stop: Callable[[str], None],
        forget: Callable[[], None],
        kept: bool,
    ) -> None:
        """
        Args:
            run: runs the turn without a cache.
            stop: stops a turn by its id.
            forget: frees what the runs left behind.
            kept: whether the conversation keeps the first answer.
        """
        super().__init__()
        self._cached, self._uncached = Lane(), Lane()
        self._early: list[Heard] = []
        """What was told before it was known which turns these are."""
        self._run = run
        self._stop = stop
        self._forget = forget
        self._kept = kept
        self._second_at = 0.0
        """When the reading without a cache began, on the monotonic clock; 0 before."""
        self._drawn: object = None

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog race"):
            yield Static("the same prompt, with the KV cache and without it", classes="head")
            yield Static(Content(FIRST), id="race-state")
            with Horizontal(id="lanes"):
                for name, style in zip(NAMES, STYLES, strict=True):
                    yield Column(name, style)
            yield Static("ms per token", id="race-axis", classes="note")
            yield Static(id="race-plot")
            yield Static(id="race-verdict")
            yield Static(Content("Esc back; it stops the run without a cache"), classes="note")

    def on_mount(self) -> None:
        """Draws from now on."""
        self.set_interval(DRAWN_EVERY_S, self._draw)

    def begin(self, cached: TurnRequest, uncached: TurnRequest) -> None:
        """These are the two; the first one runs, or is about to."""
        self._cached.request, self._uncached.request = cached, uncached
        early, self._early = self._early, []
        for told in early:
            self.hear(told)

    @property
    def _over(self) -> bool:
        return bool(self._cached.failure) or self._uncached.over

    def hear(self, told: Heard) -> None:
        """An event of one of the two runs."""
        if isinstance(told, Status):
            return
        if self._cached.request is None:
            self._early.append(told)
        for lane in (self._cached, self._uncached):
            if lane.request and lane.request.turn == told.turn:
                lane.hear(told)
                self._went_on(lane, told)

    def _went_on(self, lane: Lane, told: TurnEvent) -> None:
        second = self._uncached
        if lane is self._cached and isinstance(told, TurnFinished) and second.request:
            self._run(second.request)
        elif lane is second and isinstance(told, TurnStarted):
            self._second_at = time.monotonic()
        if self._over and isinstance(told, TurnFinished | TurnFailed):
            self._end()

    def action_leave(self) -> None:
        """Goes back; a run that nobody keeps is stopped, an answer that is kept goes on."""
        if not self._over:
            lane = self._uncached if self._cached.over else self._cached
            if lane.request and (lane is self._uncached or not self._kept):
                self._stop(lane.request.turn)
            self._forget()
        self.dismiss()

    def _end(self) -> None:
        self._forget()
        outcome = KEPT if self._kept else UNCHANGED
        self.query_one("#race-state", Static).update(Content("" if self._cached.failure else outcome))
        said = [Content.assemble((line, "bold")) for line in verdict(self._cached, self._uncached)]
        self.query_one("#race-verdict", Static).update(Content("\n").join(said))
        self._draw()

    def _draw(self) -> None:
        first, second = self._cached, self._uncached
        live = bool(self._second_at) and not second.over
        elapsed = time.monotonic() - self._second_at if live else float("inf")
        steps = first.steps_at(elapsed)
        drawn = (len(first.pieces), len(second.pieces), steps, first.over, second.over, self.size)
        if drawn == self._drawn:
            return
        self._drawn = drawn
        if live:
            self.query_one("#race-state", Static).update(Content(SECOND))
        columns = list(self.query(Column))
        columns[0].show(lane_words(first), first.text_at(elapsed))
        columns[1].show(lane_words(second), second.text)
        area = self.query_one("#race-plot", Static)
        series = [(WITHOUT, second.ms), (WITH, first.ms[:steps])]
        area.update(Content("\n".join(plot(series, area.size.width, PLOT_ROWS))))
