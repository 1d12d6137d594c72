"""The list of conversations, with what of each is warm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from textual.binding import Binding
from textual.content import Content
from textual.css.styles import RulesMap
from textual.message import Message
from textual.strip import Strip
from textual.style import Style
from textual.visual import RenderOptions, Visual
from textual.widget import Widget
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from kvchat.chat.conversation import Summary
from kvchat.contract import WarmCache
from kvchat.text import megabytes, one_line

GLYPHS = {"hot": "●", "disk": "◐", "cold": "○"}
STYLES = {"hot": "$success", "disk": "$text-muted", "cold": "$text-muted"}
BADGE_CELLS = 2
SIZE_CELLS = 9
"""Of a size, and the gap before it."""


def fitted(text: str, cells: int) -> str:
    """`text` in exactly so many cells; CJK and emoji take two each."""
    if cell_len(text) <= cells:
        return set_cell_size(text, cells)
    return set_cell_size(set_cell_size(text, cells - 1).rstrip() + "…", cells)


@dataclass(frozen=True, slots=True)
class Row(Visual):
    """A conversation on one line, as wide as the list is; its bytes stand at the right edge."""

    title: str
    where: str
    """A key of `GLYPHS`."""
    size: str
    current: bool

    @classmethod
    def of(cls, summary: Summary, warm: WarmCache | None, *, current: bool) -> "Row":
        """What is known of a conversation and its cache; `current` is the open one."""
        title = ("✱ " if summary.private else "") + (one_line(summary.title) or "untitled")
        where = "hot" if warm and warm.hot else "disk" if warm and warm.disk_bytes else "cold"
        size = megabytes(warm.bytes) if warm and warm.hot else "on disk" if where == "disk" else ""
        return cls(title, where, size, current)

    def content(self, width: int) -> Content:
        """The line in so many cells; the title has what the rest leaves."""
        taken = max(SIZE_CELLS, cell_len(self.size) + 1) if self.size else 0
        title = fitted(self.title, max(1, width - BADGE_CELLS - taken))
        return Content.assemble(
            (f"{GLYPHS[self.where]} ", STYLES[self.where]),
            (title, "bold $text-accent" if self.current else ""),
            (f"{self.size:>{taken}}" if taken else "", "$text-muted"),
        )

    def render_strips(
        self, width: int, height: int | None, style: Style, options: RenderOptions
    ) -> list[Strip]:
        """That line."""
        return self.content(width).render_strips(width, height, style, options)

    def get_optimal_width(self, rules: RulesMap, container_width: int) -> int:
        """All there is."""
        return container_width

    def get_height(self, rules: RulesMap, width: int) -> int:
        """Always one line."""
        return 1


class TitleField(Input):
    """A title that is written anew in its place in the list; Esc, or going elsewhere, leaves the old one."""

    BINDINGS = [Binding("escape", "leave", "Leave it", show=False)]

    def __init__(self, conversation: str, title: str, row: int) -> None:
        super().__init__(one_line(title), compact=True, id="title-field")
        self._conversation = conversation
        self.styles.offset = (1 + BADGE_CELLS, row)

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
        """Fills the list where something changed; `current` is marked."""
        self._titles = {summary.id: summary.title for summary in summaries}
        highlighted = (self.has_focus and self._highlighted_id()) or current
        rows = {s.id: Row.of(s, warm.get(s.id), current=s.id == current) for s in summaries}
        if rows != {option.id: option.prompt for option in self.options} or [*rows] != self._ids():
            self.clear_options()
            self.add_options(Option(row, id=conversation) for conversation, row in rows.items())
        if highlighted in rows:
            self.highlighted = [*rows].index(highlighted)

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

    def _ids(self) -> list[str | None]:
        return [option.id for option in self.options]
