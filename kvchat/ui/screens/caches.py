"""Every KV cache: in memory, on disk or cold; what it takes, and what can be done to it."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import DataTable, Static

from kvchat.chat.conversation import Summary
from kvchat.contract import CacheCommand, Drop, Pin, PoolState, Spill, Warm, WarmCache
from kvchat.text import megabytes, one_line
from kvchat.ui.widgets.conversations import fitted

WHERE = {"hot": "● in memory", "disk": "◐ on disk", "cold": "○ cold"}
TITLE_CELLS = 24
COLUMNS = {
    "where": 11,
    "conversation": TITLE_CELLS,
    "memory": 9,
    "disk": 9,
    "": 18,
    "KV": 4,
    "tokens": 8,
    "used": 5,
}
"""Cells of each; in a narrow terminal the last ones come by scrolling."""
NUMBERS = {"memory", "disk", "tokens", "used"}
HINT = "P pin · E out of memory · W into memory · D drop · B budget · T timeline · Esc back"
FILLED, EMPTY, BAR_CELLS = "█", "░", 20


def where(cache: WarmCache | None) -> str:
    """`hot`, `disk` or `cold`."""
    if cache is None:
        return "cold"
    return "hot" if cache.hot else "disk" if cache.disk_bytes else "cold"


def budget_line(pool: PoolState | None) -> str:
    """How full the budget is, as a bar and in bytes."""
    if pool is None or not pool.budget_bytes:
        return "The engine is not ready yet."
    filled = min(BAR_CELLS, round(pool.used_bytes / pool.budget_bytes * BAR_CELLS))
    bar = FILLED * filled + EMPTY * (BAR_CELLS - filled)
    disk = f"disk   {megabytes(pool.disk_bytes)} of {megabytes(pool.disk_cap_bytes)}"
    saved = disk if pool.disk_cap_bytes else "nothing is saved to disk"
    memory = f"memory {megabytes(pool.used_bytes)} of {megabytes(pool.budget_bytes)}"
    if pool.draft_bytes:
        memory += f", the draft model {megabytes(pool.draft_bytes)} of it"
    return f"{bar}  {memory}\n{'':{BAR_CELLS}}  {saved}"


def row_of(summary: Summary, cache: WarmCache | None) -> tuple[str, ...]:
    """One line of the table."""
    used = datetime.fromtimestamp(cache.last_used).strftime("%H:%M") if cache and cache.last_used else ""
    marks = ["pinned"] * bool(cache and cache.pinned) + ["next to go"] * bool(cache and cache.next_evicted)
    return (
        WHERE[where(cache)],
        fitted(one_line(summary.title) or "untitled", TITLE_CELLS),
        megabytes(cache.bytes) if cache and cache.hot else "",
        megabytes(cache.disk_bytes) if cache and cache.disk_bytes else "",
        ", ".join(marks),
        cache.kv_dtype if cache else "",
        f"{cache.tokens:,}" if cache and cache.tokens else "",
        used,
    )


def cell(text: str, column: str) -> Text:
    """Text as a cell of the table, never parsed as markup; numbers stand at the right."""
    return Text(text, justify="right" if column in NUMBERS else "left")


class CachesScreen(ModalScreen[None]):
    """The list of all caches; it stays up to date while it is open."""

    BINDINGS = [
        Binding("escape,f8,q", "dismiss(None)", "Back"),
        Binding("p", "pin", "Pin"),
        Binding("e", "spill", "Out of memory"),
        Binding("w", "warm", "Into memory"),
        Binding("d,delete", "drop", "Drop"),
        Binding("b", "budget", "Budget"),
        Binding("t", "timeline", "EventLog"),
    ]

    def __init__(
        self,
        summaries: Sequence[Summary],
        pool: PoolState | None,
        act: Callable[[CacheCommand], None],
        ask_budget: Callable[[], None],
        show_timeline: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._summaries = list(summaries)
        self._pool = pool
        self._act = act
        self._ask_budget = ask_budget
        self._show_timeline = show_timeline

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog caches"):
            yield Static("KV caches", classes="head")
            yield Static(id="budget")
            yield DataTable(cursor_type="row", zebra_stripes=True)
            yield Static(Content(HINT), classes="note")

    def on_mount(self) -> None:
        """Fills the table."""
        table = self.query_one(DataTable)
        for label, cells in COLUMNS.items():
            table.add_column(cell(label, label), width=cells)
        self._draw()

    def show(self, pool: PoolState | None) -> None:
        """Draws the caches as they are now; None where there is no engine that could have any."""
        self._pool = pool
        if self.is_mounted:
            self._draw()

    def _draw(self) -> None:
        table = self.query_one(DataTable)
        chosen = table.cursor_row
        table.clear()
        caches = self._caches()
        for summary in self._summaries:
            row = row_of(summary, caches.get(summary.id))
            table.add_row(*map(cell, row, COLUMNS), key=summary.id)
        table.move_cursor(row=min(chosen, max(0, table.row_count - 1)))
        self.query_one("#budget", Static).update(Content(budget_line(self._pool)))

    def action_pin(self) -> None:
        """Pins, or lets go."""
        if chosen := self._chosen():
            cache = self._caches().get(chosen)
            self._act(Pin(chosen, not (cache and cache.pinned)))

    def action_spill(self) -> None:
        """Moves a cache out of memory."""
        if chosen := self._chosen():
            self._act(Spill(chosen))

    def action_warm(self) -> None:
        """Brings a cache back from disk."""
        if chosen := self._chosen():
            self._act(Warm(chosen))

    def action_drop(self) -> None:
        """Frees a cache in memory and on disk; the text stays."""
        if chosen := self._chosen():
            self._act(Drop(chosen))

    def action_timeline(self) -> None:
        """Shows what happened to a cache."""
        if chosen := self._chosen():
            self._show_timeline(chosen)

    def action_budget(self) -> None:
        """Asks for another budget."""
        self._ask_budget()

    def _caches(self) -> Mapping[str, WarmCache]:
        return {cache.conversation: cache for cache in self._pool.caches} if self._pool else {}

    def _chosen(self) -> str | None:
        table = self.query_one(DataTable)
        return self._summaries[table.cursor_row].id if table.row_count else None
