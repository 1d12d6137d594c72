"""The timeline of a conversation's cache: everything that happened to it, drawn in order."""

from collections.abc import Sequence
from datetime import datetime

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from kvchat.contract import CacheEvent, CacheEventKind, TokenStatus
from kvchat.text import megabytes, one_line
from kvchat.ui.formatting import FATES

BAR_CELLS = 8
SHOWN = 400
"""Of the latest events: a long life has thousands, and `kvchat cache show` prints all of them."""
EMPTY = "Nothing has happened to this cache yet. Every turn adds to it: what was reused, read, saved, moved."
KINDS = {
    CacheEventKind.REUSE: FATES[TokenStatus.REUSED],
    CacheEventKind.MISS: FATES[TokenStatus.READ],
    CacheEventKind.EVICT: FATES[TokenStatus.EVICTED],
    CacheEventKind.SAVE: ("↓", "$text-primary"),
    CacheEventKind.SPILL: ("⇣", "$text-warning"),
    CacheEventKind.RESTORE: ("↑", "$text-success"),
    CacheEventKind.REFUSE: ("!", "$text-error"),
    CacheEventKind.FORK: ("┣", "$text-accent"),
    CacheEventKind.SHARE: ("→", "$text-accent"),
    CacheEventKind.CONVERT: ("≈", "$text-warning"),
    CacheEventKind.DROP: ("∅", "$text-error"),
}


def event_line(event: CacheEvent, largest: int) -> Content:
    """One event: when, what, how many tokens, what it took, and why."""
    glyph, style = KINDS[event.kind]
    cells = max(1, round(event.tokens / largest * BAR_CELLS)) if event.tokens and largest else 0
    took = f"{event.seconds * 1000:,.0f} ms" if event.seconds else ""
    size = megabytes(event.bytes) if event.bytes else ""
    note = one_line(event.note)
    return Content.assemble(
        (f"{datetime.fromtimestamp(event.at):%H:%M:%S} ", "$text-muted"),
        (f"{glyph} {event.kind.value:<7}", style),
        f"{event.tokens:>6,} ",
        (f"{glyph * cells:<{BAR_CELLS}}", style),
        (f"{size:>9}{took:>8}", "$text-muted"),
        (f"  {note}" if note else "", "italic"),
    )


def timeline(events: Sequence[CacheEvent]) -> Content:
    """The latest events, oldest first; a new day has a line of its own."""
    if not events:
        return Content(EMPTY)
    shown = events[-SHOWN:]
    largest = max(event.tokens for event in shown)
    lines = [Content(f"… {len(events) - SHOWN:,} earlier ones")] if len(events) > SHOWN else []
    day = ""
    for event in shown:
        today = f"{datetime.fromtimestamp(event.at):%A, %-d %B %Y}"
        if today != day:
            lines.append(Content.assemble((today, "bold $text-accent")))
            day = today
        lines.append(event_line(event, largest))
    return Content("\n").join(lines)


class TimelineScreen(ModalScreen[None]):
    """Draws it, and shows its end first."""

    BINDINGS = [
        Binding("escape,q,t", "dismiss(None)", "Back"),
        Binding("up,k", "scroll(-1)", "Up", show=False),
        Binding("down,j", "scroll(1)", "Down", show=False),
        Binding("pageup", "scroll(-20)", "Page up", show=False),
        Binding("pagedown", "scroll(20)", "Page down", show=False),
    ]

    def __init__(self, title: str, events: Sequence[CacheEvent]) -> None:
        super().__init__()
        self._title = title
        self._events = events

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog timeline"):
            yield Static(Content(f"timeline · {one_line(self._title)}"), classes="head")
            with VerticalScroll(can_focus=False):
                yield Static(timeline(self._events), classes="text")
            yield Static(
                Content("time · event · tokens · bytes · what it took · why      Esc back"), classes="note"
            )

    def on_mount(self) -> None:
        """The newest event is what one wants to see."""
        self.query_one(VerticalScroll).scroll_end(animate=False)

    def action_scroll(self, lines: int) -> None:
        """Moves the view."""
        self.query_one(VerticalScroll).scroll_relative(y=lines, animate=False)
