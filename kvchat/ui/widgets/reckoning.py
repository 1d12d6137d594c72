"""The lines under the prompt: attached files, tokens, and what sending would read."""

from textual.content import Content
from textual.widgets import Static

from kvchat.ui.reckoner import Reckoning


class ReckoningLine(Static):
    """Draws a `Reckoning`; it keeps its place while there is nothing to say, so that nothing jumps."""

    def __init__(self) -> None:
        super().__init__(" ", id="reckoning", markup=False)

    def show(self, reckoning: Reckoning) -> None:
        """Draws it anew."""
        self.update(Content("\n".join(reckoning.lines) or " "))
