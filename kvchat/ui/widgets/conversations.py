"""The list of conversations, with what of each is warm."""

from collections.abc import Mapping, Sequence

from rich.cells import cell_len, set_cell_size
from textual.binding import Binding
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from kvchat.contract import WarmCache
from kvchat.conversation import Summary
from kvchat.text import megabytes, one_line

GLYPHS = {"hot": "●", "disk": "◐", "cold": "○"}
TITLE_CELLS = 19


def fitted(text: str, cells: int) -> str:
    """`text` in exactly so many cells; CJK and emoji take two each."""
    if cell_len(text) <= cells:
        return set_cell_size(text, cells)
    return set_cell_size(set_cell_size(text, cells - 1).rstrip() + "…", cells)


class TitleField(Input):
    """A title that is written anew in its place in the list; Esc, or going elsewhere, leaves the old one."""

    BINDINGS = [Binding("escape", "leave", "Leave it", show=False)]

    def __init__(self, conversation: str, title: str, row: int) -> None:
        super().__init__(one_line(title), compact=True, id="title-field")
        self._conversation = conversation
        self.styles.offset = (2, row)

    def on_mount(self) -> None:
        """Takes the keys."""
        self.focus()

    def on_blur(self) -> None:
        """Whoever goes elsewhere has changed nothing."""
        self.remove()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter renames."""
        event.stop()
        self.post_message(ConversationList.Renamed(self._conversation, event.value))
        self.action_leave()

    def action_leave(self) -> None:
        """Goes back to the list."""
        self.screen.query_one(ConversationList).focus()


class ConversationList(OptionList):
    """Conversations, the last used first. Enter opens, R renames, D deletes."""

    BINDINGS = [
        Binding("r", "rename", "Rename"),
        Binding("d,delete", "delete", "Delete"),
    ]

    class Opened(Message):
        """The user chose a conversation."""

        def __init__(self, conversation: str) -> None:
            super().__init__()
            self.conversation = conversation

    class Renamed(Message):
        """The user wrote another title."""

        def __init__(self, conversation: str, title: str) -> None:
            super().__init__()
            self.conversation = conversation
            self.title = title

    class DeleteAsked(Message):
        """The user wants it gone."""

        def __init__(self, conversation: str) -> None:
            super().__init__()
            self.conversation = conversation

    def show(self, summaries: Sequence[Summary], warm: Mapping[str, WarmCache], current: str) -> None:
        """Fills the list; `current` is marked."""
        self._titles = {summary.id: summary.title for summary in summaries}
        highlighted = (self.has_focus and self._highlighted_id()) or current
        self.clear_options()
        self.add_options(Option(self._label(s, warm.get(s.id), s.id == current), id=s.id) for s in summaries)
        ids = [s.id for s in summaries]
        if highlighted in ids:
            self.highlighted = ids.index(highlighted)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter, or a click."""
        event.stop()
        if event.option_id:
            self.post_message(self.Opened(event.option_id))

    def action_rename(self) -> None:
        """Lets the user write another title over the highlighted one."""
        conversation, row, side = self._highlighted_id(), self.highlighted, self.parent
        if conversation and row is not None and isinstance(side, Widget):
            place = row - self.scroll_offset.y + self.region.y - side.region.y
            side.mount(TitleField(conversation, self._titles[conversation], place))

    def action_delete(self) -> None:
        """Asks for the highlighted conversation to be deleted."""
        if conversation := self._highlighted_id():
            self.post_message(self.DeleteAsked(conversation))

    def _highlighted_id(self) -> str | None:
        return None if self.highlighted is None else self.get_option_at_index(self.highlighted).id

    def _label(self, summary: Summary, warm: WarmCache | None, current: bool) -> Content:
        title = ("✱ " if summary.private else "") + (one_line(summary.title) or "untitled")
        where = "hot" if warm and warm.hot else "disk" if warm and warm.disk_bytes else "cold"
        size = megabytes(warm.bytes) if warm and warm.hot else "on disk" if where == "disk" else ""
        return Content.assemble(
            (f"{GLYPHS[where]} ", "$success" if where == "hot" else "$text-muted"),
            (fitted(title, TITLE_CELLS), "bold $text-accent" if current else ""),
            (f"{size:>9}", "$text-muted"),
        )
