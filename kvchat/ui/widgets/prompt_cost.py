"""The lines under the prompt: attached files, tokens, and what sending would read; else hints."""

from rich.cells import cell_len
from textual.content import Content
from textual.geometry import Size
from textual.widgets import Static

from kvchat.chat.prompt_cost import Reckoning

HINTS = ("Enter sends", "Ctrl+J breaks the line", "Tab goes to the messages", "Up brings back what you sent")
GAP = " · "


def hints_in(cells: int) -> str:
    """As many of the hints as fit, none of them cut."""
    shown = ""
    for hint in HINTS:
        longer = f"{shown}{GAP}{hint}" if shown else hint
        if cell_len(longer) > cells:
            break
        shown = longer
    return shown


class ReckoningLine(Static):
    """Draws a `Reckoning`. Hints keep its place meanwhile, so that nothing jumps."""

    def __init__(self) -> None:
        super().__init__(id="reckoning", markup=False)
        self._lines: list[str] = []

    def show(self, reckoning: Reckoning) -> None:
        """Draws it, where it changed."""
        if (lines := reckoning.lines) != self._lines:
            self._lines = lines
            self.refresh(layout=True)

    def render(self) -> Content:
        """What is reckoned, else the hints that fit."""
        return Content("\n".join(self._lines) or hints_in(self.size.width))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Hints take one line, whatever the width was for which they were chosen."""
        return super().get_content_height(container, viewport, width) if self._lines else 1
