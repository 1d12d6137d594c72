"""The line at the bottom: the keys that matter now, as many as fit in whole words; each can be clicked."""

from collections.abc import Sequence

from rich.cells import cell_len
from textual.content import Content
from textual.style import Style
from textual.widgets import Static

from kvchat.chat.commands import Command
from kvchat.ui.help_text import key_label

GAP = "  "
PALETTE = ("Ctrl+P", "all commands", "app.command_palette")


def fitting(entries: Sequence[tuple[str, str, str]], width: int) -> list[tuple[str, str, str]]:
    """The first of `entries` (key, word, action) that fit into so many cells, none of them cut."""
    fits, left = [], width
    for key, word, action in entries:
        left -= cell_len(f"{key} {word}{GAP}")
        if left < -len(GAP):
            break
        fits.append((key, word, action))
    return fits


class KeyLine(Static):
    """Draws that line."""

    def __init__(self, commands: Sequence[Command]) -> None:
        """`commands` carry the keys that the user gave them."""
        super().__init__(id="keys")
        named = [
            (key_label(c.key), c.footer, f"screen.run_command('{c.name}')")
            for c in commands
            if c.footer and c.key
        ]
        # what stands first stays longest in a narrow terminal
        self._entries = [*named[:1], PALETTE, *named[1:]]

    def render(self) -> Content:
        """What fits."""
        parts = [
            Content.assemble((key, "bold $text-accent"), (f" {word}", "$text-muted")).stylize(
                Style.from_meta({"@click": action})
            )
            for key, word, action in fitting(self._entries, self.size.width)
        ]
        return Content(GAP).join(parts)
