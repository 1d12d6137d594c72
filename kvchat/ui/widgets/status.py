"""The line at the top: the cache mode, what the engine does, and how full the context is."""

from textual.content import Content
from textual.widgets import Static

from kvchat.text import one_line
from kvchat.ui.widgets.panel import COLOURS, PanelState


def status_content(state: PanelState, doing: str, model: str) -> Content:
    """`doing` says what the engine does; `model` is its name."""
    parts = [doing, one_line(model)]
    if state.model:
        threads = f"{state.model.threads} thread{'s' * (state.model.threads != 1)}"
        limit = state.turn.limit or state.model.context_limit
        parts += [state.model.path, threads, f"context {state.turn.context:,} / {limit:,}"]
    return Content.assemble(
        ("kvchat  ", "bold $text-accent"),
        (f"cache {state.mode.value}", f"bold {COLOURS[state.mode]}"),
        (" · " + " · ".join(parts), "$text-muted"),
    )


class StatusLine(Static):
    """Draws that line."""

    def __init__(self) -> None:
        super().__init__(id="status")

    def show(self, state: PanelState, doing: str, model: str) -> None:
        """Draws it anew."""
        self.update(status_content(state, doing, model))
