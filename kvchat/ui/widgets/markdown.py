"""Markdown as lines of one widget: an old answer costs as much layout as a label.

Textual's own Markdown makes a widget of every paragraph, item and cell; a conversation of many answers takes
seconds to lay out then. Here Rich draws each top-level block into lines, once for a width, and text that
streams in draws only its last block anew.
"""

import re
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from kvchat.text import clean
from kvchat.ui.widgets.original_breaks import BREAK, joined, joints_of

if TYPE_CHECKING:
    from rich.console import Console

FOUND = "bold $text on $warning 60%"
"""Words that were searched for, where a text is drawn by Textual itself."""
ROOM = 80
"""Cells that a line may take beside its own letters: indents, bullets."""
NARROWEST = 8
"""Cells; what is nested deeper than the width allows is cut off rather than drawn."""
STYLES = {
    "heading": ["markdown.h1", "markdown.h2", "markdown.h3", "markdown.h4", "markdown.h5", "markdown.h6"],
    "code": ["markdown.code"],
    "quiet": ["markdown.block_quote", "markdown.hr", "markdown.table.border", "markdown.link_url"],
    "mark": ["markdown.item.bullet", "markdown.item.number", "markdown.table.header", "markdown.link"],
    "fence": ["kvchat.fence"],
    "found": ["kvchat.found"],
}
"""Component class → the styles of Rich that it sets."""


def markdown_of(text: str) -> str:
    """A text as Markdown to draw: cleaned, with one kind of line end."""
    return clean(text).replace("\u2028", "\n").replace("\u2029", "\n")


def code_blocks(text: str) -> list[str]:
    """The code blocks of an answer, in order, without their fences; an open fence counts too."""
    from kvchat.ui.widgets.markdown_layout import parser

    tokens = parser().parse(markdown_of(text))
    return [token.content for token in tokens if token.type in ("fence", "code_block")]


class MarkdownText(Widget):
    """A text of Markdown that may grow."""

    COMPONENT_CLASSES = {f"markdown--{name}" for name in STYLES}
    DEFAULT_CSS = """
    MarkdownText { height: auto; }
    MarkdownText .markdown--heading { color: $text-accent; text-style: bold; }
    MarkdownText .markdown--code { color: $text-warning; background: $surface; }
    MarkdownText .markdown--quiet { color: $text-muted; }
    MarkdownText .markdown--mark { color: $text-primary; text-style: bold; }
    MarkdownText .markdown--fence { background: $surface; }
    MarkdownText .markdown--found { color: $text; background: $warning 60%; text-style: bold; }
    """

    def __init__(self, source: str = "") -> None:
        """`source` is cleaned already (see `markdown_of`)."""
        super().__init__()
        self.source = source
        self._width = 0
        """Cells that the lines were drawn for; 0 where they have to be drawn anew."""
        self._settled: list[Strip] = []
        """Lines of the blocks that can't change any more, since another one follows."""
        self._settled_at = 0
        """Characters of `source` that they stand for."""
        self._last: list[Strip] = []
        self._drawn = 0
        """Characters of `source` that are drawn."""
        self._found: re.Pattern[str] | None = None
        self._base = Style()
        """Of the widget's own; lines are drawn over it."""
        self._drawing: tuple[int, Console] | None = None
        """(width, where Rich draws)."""

    def update(self, source: str) -> None:
        """Replaces the text."""
        self.source, self._width = source, 0
        self.refresh(layout=True)

    def append(self, text: str) -> None:
        """Adds text at the end; only another line lays the screen out anew, which costs the most."""
        width = self._width
        before = len(self.lines(width)) if width else -1
        settled = len(self._settled)
        self.source += text
        now = len(self.lines(width)) if width else 0
        if now == before:
            self.refresh(Region(0, settled, self.size.width, now - settled))
        else:
            self.refresh(layout=True)

    def on_unmount(self) -> None:
        """Frees the lines at once: a widget is garbage that only a search finds, and that is a pause."""
        self._settled, self._last, self._width = [], [], 0

    def mark(self, pattern: re.Pattern[str] | None) -> None:
        """Marks what matches, where it stands on one line."""
        self._found = pattern
        self.refresh()

    def notify_style_update(self) -> None:
        """Another theme: the lines have other colours."""
        self._width, self._drawing = 0, None
        super().notify_style_update()

    def get_content_width(self, container: Size, viewport: Size) -> int:
        """All there is: tables and rules fill it."""
        return container.width

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many rows as it has lines."""
        return len(self.lines(width))

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The selected text, without the blanks that fill the lines and the breaks that the width made."""
        parts, joints = [], []
        for y, (line, joint) in enumerate(self._copied_lines()):
            if (span := selection.get_span(y)) is not None:
                start, end = span
                parts.append(line[start : None if end == -1 else end])
                joints.append(joint)
        return joined(parts, joints), "\n"

    def _copied_lines(self) -> list[tuple[str, str]]:
        """Each line on the screen without its padding, and what stands between it and the next in a copy."""
        from kvchat.ui.widgets.markdown_layout import console_of, draw_block, parser, top_level_blocks

        narrow, code_theme = self._drawing_on(max(self.size.width, NARROWEST))
        wide = console_of(max(map(len, self.source.split("\n"))) + ROOM, self._styles())
        found: list[tuple[str, str]] = []
        for block in top_level_blocks(parser().parse(self.source)):
            lines, whole = (
                [strip.text.rstrip() for strip in draw_block(block, console, code_theme)]
                for console in (narrow, wide)
            )
            if found and lines:
                found.append(("", BREAK))
            found += zip(lines, joints_of(lines, whole), strict=True)
        return found

    def selection_updated(self, selection: Selection | None) -> None:
        """Draws it."""
        self.refresh()

    def render_lines(self, crop: Region) -> list[Strip]:
        """Some lines; what is the same for all of them is looked up once."""
        self._base = self.rich_style
        return super().render_lines(crop)

    def render_line(self, y: int) -> Strip:
        """One line, with what is found and what is selected over it."""
        width, base = self.size.width, self._base
        lines = self.lines(width)
        if y >= len(lines):
            return Strip.blank(width, base)
        strip = lines[y].apply_style(base).adjust_cell_length(width, base)
        if self._found:
            style = self.get_component_rich_style("markdown--found")
            for match in self._found.finditer(strip.text):
                strip = styled(strip, match.start(), match.end(), style)
        selection = self.text_selection
        if selection is not None and (span := selection.get_span(y)) is not None:
            start, end = span
            style = self.screen.get_component_rich_style("screen--selection")
            strip = styled(strip, start, len(strip.text) if end == -1 else end, style)
        return strip.apply_offsets(0, y)

    def lines(self, width: int) -> list[Strip]:
        """The text as lines of at most so many cells; draws what is new since the last time."""
        if width != self._width:
            self._width = width
            self._settled, self._last, self._settled_at, self._drawn = [], [], 0, 0
        if self._drawn != len(self.source):
            self._draw(max(width, NARROWEST))
            self._drawn = len(self.source)
        return self._settled + self._last

    def _draw(self, width: int) -> None:
        """Draws from the last block on."""
        from kvchat.ui.widgets.markdown_layout import draw_block, parser, top_level_blocks

        text = self.source[self._settled_at :]
        blocks = list(top_level_blocks(parser().parse(text)))
        console, code_theme = self._drawing_on(width)
        for block in blocks[:-1]:
            self._settled += self._separated(draw_block(block, console, code_theme))
        self._last = self._separated(draw_block(blocks[-1], console, code_theme)) if blocks else []
        if len(blocks) > 1 and (place := blocks[-1][0].map):
            self._settled_at += sum(map(len, text.split("\n")[: place[0]])) + place[0]

    def _separated(self, lines: list[Strip]) -> list[Strip]:
        return [Strip([]), *lines] if self._settled and lines else lines

    def _drawing_on(self, width: int) -> "tuple[Console, str]":
        """(where Rich draws, the theme of code)."""
        from kvchat.ui.widgets.markdown_layout import console_of

        if self._drawing is None or self._drawing[0] != width:
            self._drawing = (width, console_of(width, self._styles()))
        return self._drawing[1], "monokai" if self.app.current_theme.dark else "friendly"

    def _styles(self) -> dict[str, Style]:
        return {
            style: self.get_component_rich_style(f"markdown--{name}", partial=True)
            for name, rich_names in STYLES.items()
            for style in rich_names
        }


def styled(strip: Strip, start: int, end: int, style: Style) -> Strip:
    """`strip` with a style over the characters from `start` to `end`."""
    text = strip.text
    first, last = cell_len(text[:start]), cell_len(text[:end])
    middle = strip.crop(first, last)
    over = Strip(Segment.apply_style(middle, post_style=style), middle.cell_length)
    return Strip.join([strip.crop(0, first), over, strip.crop(last)])
