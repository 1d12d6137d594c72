"""The list over the prompt that offers commands while a slash word is typed.

It never has the focus: the prompt hands it the keys that it may want.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence

from textual import events
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from kvchat.ui.completion import Completion, completions

MOST_LABEL_CELLS, GAP, PADDING = 34, 2, 3
STEPS = {"down": 1, "up": -1}


class Completions(OptionList):
    """What the text in the prompt may become; hidden where that is nothing."""

    can_focus = False

    class Taken(Message):
        """The user clicked a completion."""

        def __init__(self, completion: Completion) -> None:
            super().__init__()
            self.completion = completion

    def __init__(self, arguments: Callable[[], Mapping[str, Sequence[str]]]) -> None:
        """`arguments` says which words the arguments of commands may be, by the command's name."""
        super().__init__(id="completions", compact=True)
        self._arguments = arguments
        self._found: list[Completion] = []
        self._dismissed = ""
        """Text for which the user closed the list."""
        self.display = False

    def offer(self, text: str) -> None:
        """Shows what `text` may become."""
        found = [] if text == self._dismissed else completions(text, self._arguments())
        if found != self._found:
            self._found = found
            self.clear_options()
            self.add_options(self._offers())
            # a lone slash has chosen nothing yet: Enter must not run whatever stands first
            self.highlighted = 0 if found and text != "/" else None
        self.display = bool(found)

    @property
    def chosen(self) -> Completion | None:
        """The completion that Tab or Enter would take; None where the list is hidden or nothing is marked."""
        return self._found[self.highlighted] if self._found and self.highlighted is not None else None

    @property
    def first(self) -> Completion | None:
        """The marked completion, else the first one."""
        return self.chosen or (self._found[0] if self._found else None)

    def step(self, key: str) -> bool:
        """Moves the mark where `key` says so; False where the list is hidden or the key is no step."""
        if key not in STEPS or not self._found:
            return False
        now = -1 if self.highlighted is None and STEPS[key] > 0 else self.highlighted or 0
        self.highlighted = (now + STEPS[key]) % len(self._found)
        return True

    def dismiss(self, text: str) -> bool:
        """Hides the list until `text` is another one; False where it was hidden."""
        if not self._found:
            return False
        self._dismissed = text
        self.offer(text)
        return True

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A click."""
        event.stop()
        self.post_message(self.Taken(self._found[event.option_index]))

    def on_resize(self, event: events.Resize) -> None:
        """Another width has room for more words."""
        for index, option in enumerate(self._offers()):
            self.replace_option_prompt_at_index(index, option.prompt)

    def _offers(self) -> list[Option]:
        labels = min(MOST_LABEL_CELLS, max((len(each.label) for each in self._found), default=0)) + GAP
        # hidden, it has no width yet
        room = (self.scrollable_content_region.width or self.app.size.width) - labels - PADDING
        return [
            Option(
                Content.assemble(
                    (f"{each.label:<{labels}}", "bold $text-primary"),
                    (shortened(each.help, room), "$text-muted"),
                )
            )
            for each in self._found
        ]


def shortened(text: str, cells: int) -> str:
    """As many whole words of `text` as fit."""
    return textwrap.shorten(text, max(cells, 2), placeholder=" …")
