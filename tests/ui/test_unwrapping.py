"""Copied text has its author's line breaks, not those that the width of the screen made."""

import pytest
from textual.app import App, ComposeResult
from textual.geometry import Offset
from textual.selection import SELECT_ALL, Selection

from kvchat.ui.widgets.markdown import MarkdownText
from kvchat.ui.widgets.original_breaks import joined, joints_of

PROSE = "The Brenner is kept open all year, and most of the high passes open between late May and June."
LONG_WORD = "supercalifragilisticexpialidocious" * 3
CJK = "布伦纳山口全年开放" * 6
TABLE = "| pass | open |\n|---|---|\n| Brenner | all the year, but for storms and the worst of winters |"


class Page(App[None]):
    """One text, 30 cells wide."""

    CSS = "MarkdownText { width: 30; }"

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = MarkdownText(text)

    def compose(self) -> ComposeResult:
        yield self.text


async def copied(text: str, selection: Selection = SELECT_ALL) -> str:
    page = Page(text)
    async with page.run_test():
        assert len(page.text.lines(30)) > 1
        found = page.text.get_selection(selection)
    assert found
    return found[0]


@pytest.mark.parametrize(
    "text", [PROSE, LONG_WORD, CJK, f"{PROSE}\n\n{CJK}", f"Read {LONG_WORD} and {PROSE}"]
)
async def test_paragraphs_are_copied_as_they_were_written(text: str) -> None:
    assert await copied(text) == text


async def test_items_of_a_list_stay_lines_of_their_own() -> None:
    assert await copied(f"1. {PROSE}\n2. Short.") == f" 1 {PROSE}\n 2 Short."


async def test_quotes_and_what_is_nested_in_them_are_copied_in_the_lines_of_their_author() -> None:
    assert await copied(f"> {PROSE}\n>\n> {CJK}") == f"▌ {PROSE}\n▌ {CJK}"
    assert await copied(f"> > {PROSE}\n\nAfter.") == f"▌ ▌ {PROSE}\n\nAfter."
    assert await copied(f"> 1. {PROSE}\n> 2. Short.") == f"▌  1 {PROSE}\n▌  2 Short."
    assert await copied(f"- {PROSE}\n  - {CJK}\n    > {PROSE}") == f" • {PROSE}\n    • {CJK}\n      ▌ {PROSE}"


async def test_a_part_of_a_quote_begins_in_the_middle_of_a_line() -> None:
    assert (await copied(f"> {PROSE}", Selection(Offset(6, 0), None))) == PROSE[4:]


async def test_code_keeps_its_lines_and_indents() -> None:
    code = f"def chains(month):\n    return month < 6 or {'x' * 40}"
    assert (await copied(f"```python\n{code}\n```")).replace("\n ", "\n").strip() == code


async def test_a_part_begins_and_ends_in_the_middle_of_lines() -> None:
    first = "The Brenner is kept open all"  # 30 cells hold no more
    assert await copied(PROSE, Selection(Offset(4, 0), Offset(6, 1))) == PROSE[4 : len(first) + 7]


async def test_what_is_laid_out_in_columns_keeps_the_lines_of_the_screen() -> None:
    text = await copied(TABLE)
    assert "Brenner" in text
    assert len(text.split("\n")) > 3


def test_lines_of_another_text_all_end_with_a_break() -> None:
    assert joints_of(["one", "two"], ["one three"]) == ["\n", "\n"]
    assert joints_of(["one", "two", "more"], ["one two"]) == ["\n", "\n", "\n"]
    assert joints_of(["one", "", "two"], ["one", "", "two"]) == ["\n", "\n", "\n"]


def test_a_line_that_goes_on_is_not_indented() -> None:
    assert joined([" • one", "   two", " • three"], [" ", "\n", "\n"]) == " • one two\n • three"
