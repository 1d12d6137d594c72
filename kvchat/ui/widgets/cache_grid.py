"""The cache as a picture: a cell for each block of tokens, in order, a line of cells for each message.

Rows of cells are laid out by functions of plain values; the widget draws them and moves a cursor over them.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from textual import events
from textual.binding import Binding
from textual.content import Content
from textual.geometry import Region, Size
from textual.message import Message
from textual.widget import Widget

from kvchat.chat.wording import BITS
from kvchat.contract import CacheBlock, CacheMap, LayerGroup, PromptMessage

LABEL_CELLS = 13
CELL = 2
"""Columns of a cell: what it holds, and a mark."""
WIDEST = 32
"""Cells of a line, at most."""
ROLE_STYLES = {
    "system": "$text-accent",
    "user": "$text-secondary",
    "assistant": "$text-primary",
    "template": "$text-muted",
    "": "$text-error",
}
EXACT, EIGHT_BITS, FOUR_BITS, ON_DISK, GONE, OUT_OF_SIGHT, STATE = "█", "▓", "▒", "◌", "×", "╌", "≈"
SINK, SHARED, SAVED, CURSOR = "◆", "+", "·", "◀"
LEGEND = {
    EXACT: "exact",
    EIGHT_BITS: "8 bits",
    FOUR_BITS: "4 bits",
    ON_DISK: "on disk only",
    GONE: "evicted",
    SINK: "sink",
    SHARED: "shared",
    SAVED: "on disk too",
}
LAYER_LEGEND = {OUT_OF_SIGHT: "out of the window", STATE: "one state for all"}
TIE = "\N{NO-BREAK SPACE}"
STATEFUL = {"recurrent", "convolution"}


@dataclass(frozen=True, slots=True)
class Line:
    """Cells of one message beside each other."""

    label: str
    """Empty where it goes on."""
    cells: range
    """Indices of blocks."""


def message_names(messages: Sequence[PromptMessage]) -> list[str]:
    """What the messages of a prompt are called beside the map, and the answer that comes next."""
    names, question = list[str](), 0
    for message in messages:
        question += message.role == "user"
        names.append(
            {"user": f"you · {question}", "assistant": f"answer · {question}"}.get(message.role, "system")
        )
    return [*names, f"answer · {question}"]


def name_of(block: CacheBlock, names: Sequence[str]) -> str:
    """Whose tokens a block has."""
    if block.message is None:
        return "left over"
    return names[block.message] if block.message < len(names) else ""


def lines_of(blocks: Sequence[CacheBlock], names: Sequence[str], width: int) -> list[Line]:
    """The blocks in lines of at most `width` cells; every message begins a line."""
    lines = []
    for name, group in groupby(range(len(blocks)), lambda index: name_of(blocks[index], names)):
        cells = list(group)
        for first in range(0, len(cells), width):
            part = cells[first : first + width]
            lines.append(Line("" if first else name, range(part[0], part[-1] + 1)))
    return lines


def glyph_of(block: CacheBlock, layer: LayerGroup, tokens: int) -> str:
    """How a block looks in layers of a kind; `tokens` are all there are."""
    if not block.in_memory:
        return ON_DISK if block.on_disk else GONE
    if layer.kind in STATEFUL:
        return STATE
    if layer.window and block.start + block.tokens <= tokens - layer.window:
        return OUT_OF_SIGHT
    return {8: EIGHT_BITS, 4: FOUR_BITS}.get(BITS.get(block.precision, 16), EXACT)


def mark_of(block: CacheBlock) -> str:
    """What else there is to see of a block: the rarest of it."""
    if block.sink or block.shared:
        return SINK if block.sink else SHARED
    return SAVED if block.on_disk and block.in_memory else " "


def legend(told: CacheMap, width: int) -> str:
    """The glyphs that can be seen, with their meaning, in lines in which no glyph parts from its word."""
    tokens = sum(block.tokens for block in told.blocks)
    seen = {glyph_of(block, layer, tokens) for block in told.blocks for layer in told.layers}
    seen |= {mark_of(block) for block in told.blocks}
    entries = ["a cell is up to 16 tokens"]
    entries += [f"{glyph} {word}" for glyph, word in (LEGEND | LAYER_LEGEND).items() if glyph in seen]
    kept_together = [entry.replace(" ", TIE) for entry in entries]
    return textwrap.fill("   ".join(kept_together), max(width, 1)).replace(TIE, " ")


class CacheGrid(Widget, can_focus=True):
    """Draws the map of a cache; arrows and the mouse move its cursor."""

    BINDINGS = [
        Binding("left,h", "step(-1)", "Before", show=False),
        Binding("right,l", "step(1)", "After", show=False),
        Binding("up,k", "line(-1)", "Line up", show=False),
        Binding("down,j", "line(1)", "Line down", show=False),
        Binding("pageup", "line(-8)", "Up", show=False),
        Binding("pagedown", "line(8)", "Down", show=False),
        Binding("home", "step(-1000000)", "First", show=False),
        Binding("end", "step(1000000)", "Last", show=False),
    ]

    class Moved(Message):
        """The cursor stands on another block."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def __init__(self) -> None:
        super().__init__()
        self._map: CacheMap | None = None
        self._names: Sequence[str] = ()
        self._lines: list[Line] = []
        self.cursor = 0

    def show(self, told: CacheMap, names: Sequence[str]) -> None:
        """Draws a map; the cursor starts at the newest block."""
        self._map, self._names = told, names
        self.cursor = max(0, len(told.blocks) - 1)
        self._lay_out()
        self.call_after_refresh(self._move_to, self.cursor)

    def on_resize(self) -> None:
        """Another width holds other lines."""
        self._lay_out()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """A band for each line: one row for each kind of layers."""
        return max(1, len(self._lines) * self._band)

    def render(self) -> Content:
        """All lines."""
        return Content("\n").join(row for line in self._lines for row in self._rows(line))

    def action_step(self, cells: int) -> None:
        """Moves along the tokens."""
        self._move_to(self.cursor + cells)

    def action_line(self, lines: int) -> None:
        """Moves to the cell above or below."""
        if not self._lines:
            return
        here = self._line_of(self.cursor)
        column = self.cursor - self._lines[here].cells.start
        there = self._lines[min(max(here + lines, 0), len(self._lines) - 1)].cells
        self._move_to(min(there.start + column, there.stop - 1))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """The cursor follows the mouse."""
        if (index := self._cell_at(event.x, event.y)) is not None:
            self._move_to(index, scroll=False)

    def on_click(self, event: events.Click) -> None:
        """A click takes the cursor there, too."""
        if (index := self._cell_at(event.x, event.y)) is not None:
            self._move_to(index)

    @property
    def _band(self) -> int:
        return max(1, len(self._map.layers)) if self._map else 1

    def _lay_out(self) -> None:
        width = min(WIDEST, max(1, (self.size.width - LABEL_CELLS) // CELL))
        self._lines = lines_of(self._map.blocks, self._names, width) if self._map else []
        self.refresh(layout=True)

    def _rows(self, line: Line) -> list[Content]:
        assert self._map is not None
        tokens = sum(block.tokens for block in self._map.blocks)
        several = len(self._map.layers) > 1
        rows = []
        for number, layer in enumerate(self._map.layers):
            label = layer.kind if several and number else line.label
            cells = [self._cell(index, layer, tokens) for index in line.cells]
            rows.append(Content.assemble((f"{label:<{LABEL_CELLS}}", "$text-muted"), *cells))
        return rows

    def _cell(self, index: int, layer: LayerGroup, tokens: int) -> tuple[str, str]:
        assert self._map is not None
        block = self._map.blocks[index]
        style = ROLE_STYLES.get(block.role, "")
        glyph = glyph_of(block, layer, tokens)
        if index == self.cursor:
            return glyph + CURSOR, f"bold {style}"
        return glyph + mark_of(block), style

    def _line_of(self, index: int) -> int:
        return next((n for n, line in enumerate(self._lines) if index in line.cells), 0)

    def _cell_at(self, x: int, y: int) -> int | None:
        line, column = y // self._band, (x - LABEL_CELLS) // CELL
        if not 0 <= line < len(self._lines) or column < 0 or column >= len(self._lines[line].cells):
            return None
        return self._lines[line].cells[column]

    def _move_to(self, index: int, *, scroll: bool = True) -> None:
        if self._map is None or not self._map.blocks:
            return
        self.cursor = min(max(index, 0), len(self._map.blocks) - 1)
        self.refresh()
        self.post_message(self.Moved(self.cursor))
        parent = self.parent
        if scroll and isinstance(parent, Widget):
            row = self._line_of(self.cursor) * self._band
            parent.scroll_to_region(Region(0, row, 1, self._band), animate=False)
