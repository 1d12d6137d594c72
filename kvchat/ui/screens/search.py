"""Search in all conversations: words above, hits below; Enter opens one where the words stand."""

from collections.abc import Callable, Sequence

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from kvchat.chat.conversation import Hit
from kvchat.chat.session import MOST_HITS
from kvchat.text import EXCERPT, excerpt, found_pattern, one_line
from kvchat.ui.widgets.markdown import FOUND

SEARCH_AFTER_S = 0.15
"""After the last key; typing must not wait for the file."""
EMPTY = "Words that stand in a message or a title, in any order and in any case; parts of words count."
HINT = "Enter opens · Up and Down choose · Esc back"


def hit_label(hit: Hit, words: Sequence[str]) -> Content:
    """A hit on two lines: where it is, and what stands there."""
    who = {"user": "you", "assistant": "answer"}.get(hit.role, "title")
    head = Content.assemble(
        (one_line(hit.title) or "untitled", "bold"),
        (f" · {who}", "$text-muted"),
        (" · not sent" if hit.not_sent else "", "$text-warning"),
        (" · other branch" if hit.other_branch else "", "$text-warning"),
        (f" · {hit.created_at[:10]}", "$text-muted"),
    )
    if hit.message is None:
        return head.highlight_regex(found_pattern(words), style=FOUND)
    line = (
        Content(excerpt(hit.text, words)).truncate(EXCERPT).highlight_regex(found_pattern(words), style=FOUND)
    )
    return Content("\n").join([head, line])


class SearchScreen(ModalScreen[tuple[Hit, list[str]] | None]):
    """Asks for words, and answers with the hit that was chosen."""

    BINDINGS = [
        Binding("escape,ctrl+f", "dismiss(None)", "Back", priority=True),
        Binding("down", "choose(1)", show=False, priority=True),
        Binding("up", "choose(-1)", show=False, priority=True),
    ]

    def __init__(self, search: Callable[[Sequence[str]], list[Hit]], words: str = "") -> None:
        super().__init__()
        self._search = search
        self._typed = words
        self._hits: list[Hit] = []
        self._timer: Timer | None = None

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog search"):
            yield Input(one_line(self._typed), placeholder="Search in all conversations")
            yield Static(Content(EMPTY), id="found", classes="note")
            yield OptionList(id="hits")
            yield Static(Content(HINT), classes="note")

    def on_mount(self) -> None:
        """Searches at once for what was given."""
        self.query_one(OptionList).can_focus = False
        self._look()

    def on_input_changed(self) -> None:
        """Searches soon."""
        if self._timer:
            self._timer.stop()
        self._timer = self.set_timer(SEARCH_AFTER_S, self._look)

    def on_input_submitted(self) -> None:
        """Opens the chosen hit; what was typed since the last search is searched first."""
        self._look()
        chosen = self.query_one(OptionList).highlighted
        if chosen is not None:
            self._open(chosen)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A click opens too."""
        event.stop()
        self._open(event.option_index)

    def action_choose(self, step: int) -> None:
        """Moves the mark."""
        hits = self.query_one(OptionList)
        (hits.action_cursor_down if step > 0 else hits.action_cursor_up)()

    @property
    def _words(self) -> list[str]:
        return self.query_one(Input).value.split()

    def _look(self) -> None:
        words = self._words
        hits = self._search(words)
        if hits == self._hits and words:
            self._say(words)
            return
        self._hits = hits
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(Option(hit_label(hit, words)) for hit in hits)
        options.highlighted = 0 if hits else None
        self._say(words)

    def _say(self, words: Sequence[str]) -> None:
        count = len(self._hits)
        found = f"{count:,} hit{'s' * (count != 1)}" if count else "Nothing has all of these words."
        found = f"the latest {found}" if count >= MOST_HITS else found
        self.query_one("#found", Static).update(Content(found if words else EMPTY))

    def _open(self, place: int) -> None:
        self.dismiss((self._hits[place], self._words))
