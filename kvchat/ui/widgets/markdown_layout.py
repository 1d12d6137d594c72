"""Markdown as lines: Rich lays out each top-level block.

Imported with the first answer that is drawn: the parser, Rich's Markdown and the highlighter of code take a
while, and an empty screen needs none of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, TableElement
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme
from textual.strip import Strip


@cache
def parser() -> MarkdownIt:
    """Markdown as models write it; raw HTML stays visible as text. Made once: that takes a millisecond."""
    return MarkdownIt("gfm-like").disable(["html_block", "html_inline"])


class LeftHeading(Heading):
    """A heading that starts where the text does."""

    LEVEL_ALIGN = {}


class Fence(CodeBlock):
    """Code on the theme's own background; long lines are wrapped, so that all of them can be read."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        background = console.get_style("kvchat.fence").bgcolor
        yield Syntax(
            str(self.text).rstrip(),
            self.lexer_name,
            theme=self.theme,
            word_wrap=True,
            padding=(0, 1),
            background_color=background.name if background else "default",
        )


class AlignedTable(TableElement):
    """A table whose columns stand as the Markdown says."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            if isinstance(part, Table):
                for column in part.columns:
                    cells = [cell for cell in column.cells if isinstance(cell, Text)]
                    column.justify = (cells[0].justify if cells else None) or "left"
            yield part


class MarkdownLines(Markdown):
    """Rich's Markdown from tokens of our parser."""

    elements = {
        **Markdown.elements,
        "heading_open": LeftHeading,
        "fence": Fence,
        "code_block": Fence,
        "table_open": AlignedTable,
    }

    @classmethod
    def of(cls, tokens: list[Token], code_theme: str) -> "MarkdownLines":
        """Those tokens, with code in the colours of that theme."""
        made = copy(cls._of_nothing(code_theme))
        made.parsed = tokens
        return made

    @classmethod
    @cache
    def _of_nothing(cls, code_theme: str) -> "MarkdownLines":
        """Made once for a theme: Rich makes a parser of its own each time, which takes as long as a draw."""
        return cls("", code_theme=code_theme, hyperlinks=False)


def top_level_blocks(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each block that stands in no other."""
    block: list[Token] = []
    depth = 0
    for token in tokens:
        block.append(token)
        depth += token.nesting
        if depth == 0:
            yield block
            block = []


def console_of(width: int, styles: Mapping[str, Style]) -> Console:
    """Where Rich draws, in so many cells and these styles."""
    return Console(
        width=width,
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
        theme=Theme(dict(styles)),
    )


def draw_block(tokens: list[Token], console: Console, code_theme: str) -> list[Strip]:
    """One block as lines, without blank ones around it."""
    try:
        lines = console.render_lines(MarkdownLines.of(tokens, code_theme), pad=False)
    except Exception:  # whatever a model writes is shown: as plain text, where Rich can't lay it out
        text = "\n".join(token.content for token in tokens if token.content)
        lines = console.render_lines(Text(text), pad=False)
    strips = [Strip(line) for line in lines]
    while strips and is_blank(strips[0]):
        del strips[0]
    while strips and is_blank(strips[-1]):
        del strips[-1]
    return strips


def is_blank(strip: Strip) -> bool:
    """Whether nothing of it can be seen."""
    return not strip.text.strip() and not any(s.style and s.style.bgcolor for s in strip)
