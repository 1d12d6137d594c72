"""The line at the top: the cache mode, what the engine does, and how full the context is."""

from dataclasses import replace

from rich.cells import cell_len
from textual import events
from textual.content import Content
from textual.widgets import Static

from kvchat.chat.state import ChatState
from kvchat.text import one_line
from kvchat.ui.widgets.panel import COLOURS

NAME = "kvchat"
GAP = 2


def status_content(state: ChatState, doing: str, width: int) -> Content:
    """The line in so many cells: what doesn't fit is left out whole, the least important first.

    Args:
        state: what is drawn.
        doing: what the engine does.
        width: cells; 0 leaves nothing out.
    """
    mode = f"cache {state.mode.value}"
    parts, context = [doing, one_line(state.model_title)], ""
    if state.model:
        parts += [state.model.path, f"{state.model.threads} thread{'s' * (state.model.threads != 1)}"]
        limit = state.turn.limit or state.model.context_limit
        used = state.turn.context
        context = f"context {used:,} / {limit:,} {used / limit:>5.0%}" if limit else ""
    left = width - len(NAME) - GAP - len(mode)
    room = left - len(context) - GAP
    room = room if cell_len(doing) + 3 <= room else left
    kept = [part for index, part in enumerate(parts) if not width or _fits(parts[: index + 1], room)]
    said = "".join(f" · {part}" for part in kept)
    gap = left - cell_len(said) - len(context)
    return Content.assemble(
        (f"{NAME}{' ' * GAP}", "bold $text-accent"),
        (mode, f"bold {COLOURS[state.mode]}"),
        (said, "$text-muted"),
        (" " * gap + context if gap >= GAP else "" if width else f" · {context}", "$text-muted"),
    )


def _fits(parts: list[str], width: int) -> bool:
    # what is being done is always said
    return len(parts) == 1 or sum(cell_len(part) + 3 for part in parts) <= width


class StatusLine(Static):
    """Draws that line."""

    def __init__(self) -> None:
        super().__init__(id="status")
        self._shown: tuple[ChatState, str] = (ChatState(), "starting")

    def show(self, state: ChatState, doing: str) -> None:
        """Draws it anew."""
        shown = (replace(state, active=None), doing)
        if shown != self._shown:
            self._shown = shown
            self._draw()

    def on_resize(self, event: events.Resize) -> None:
        """Another width has room for other parts."""
        self._draw()

    def _draw(self) -> None:
        # it is always one line high
        self.update(status_content(*self._shown, self.content_size.width), layout=False)
