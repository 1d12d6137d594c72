"""What stands in an empty conversation: what to do, and what there will be to see."""

from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static

ROOMY, TALL = 56, 26
"""Cells and lines that the whole text needs."""
STEPS = (
    ("Ask something, then ask about the answer.", "Only your new words are read: the rest is cached."),
    ("Press F4 and ask again.", "Without the cache, every turn reads everything."),
    (
        "Ctrl+N opens another one, Ctrl+S goes back.",
        "Each keeps its cache, also when kvchat is closed.",
    ),
)
WORDS = (
    ("reused", "$text-success", "stood in the cache and cost nothing"),
    ("read", "$text-warning", "went through the model once"),
    ("written", "$text-primary", "are the answer"),
)
READY = "Write below. A model on this machine answers."
LOADING = "The model is being loaded. Write already."


class Welcome(Static):
    """Draws that text, shorter where there is less room."""

    ready = reactive(True)
    """Whether the engine takes turns."""

    def __init__(self) -> None:
        super().__init__(classes="welcome")

    def render(self) -> Content:
        """The text for this width and height."""
        lines = [Content.assemble((READY if self.ready else LOADING, "bold")), Content("")]
        wide = self.container_size.width >= ROOMY
        for number, (do, see) in enumerate(STEPS, start=1):
            lines += [Content.assemble((f"{number}  ", "$text-accent"), do)]
            lines += [Content.assemble((f"   {see}", "$text-muted"))] if wide else []
        if self.screen.size.height >= TALL and wide:
            lines += [Content(""), Content.assemble(("The panel counts tokens:", "$text-muted"))]
            lines += [
                Content.assemble((f"   {name:<9}", style), (means, "$text-muted"))
                for name, style, means in WORDS
            ]
        hint = "/ commands · F1 help · F2 settings · Ctrl+L models"
        return Content("\n").join([*lines, Content(""), Content.assemble((hint, "$text-muted"))])
