"""Small questions over the chat: a line of text, a yes or no, and the help."""

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Markdown, Static

from kvchat.chat.commands import COMMANDS, Command
from kvchat.text import clean, one_line
from kvchat.ui.help_text import help_markdown


class AskLine(ModalScreen[str | None]):
    """Asks for a line of text; None when the user turned away."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question = question
        self._value = value

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(self._question))
            yield Input(one_line(self._value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter answers; what was not edited keeps its line breaks."""
        self.dismiss(self._value if event.value == one_line(self._value) else event.value)


class Confirm(ModalScreen[bool]):
    """Asks before something that can't be undone; Enter alone leaves everything as it is."""

    AUTO_FOCUS = "#no"
    BINDINGS = [Binding("escape,n", "dismiss(False)", "No"), Binding("y", "dismiss(True)", "Yes")]

    def __init__(self, question: str, yes: str) -> None:
        super().__init__()
        self._question = clean(question)
        self._yes = yes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(self._question))
            yield Button(f"{self._yes} (Y)", variant="error", id="yes")
            yield Button("Keep it (Esc)", id="no")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """A button answers."""
        self.dismiss(event.button.id == "yes")


class Explanation(ModalScreen[None]):
    """Something explained."""

    BINDINGS = [Binding("escape,enter,f6,q", "dismiss(None)", "Close")]

    def __init__(self, title: str, text: Content) -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            yield Static(Content(self._title), classes="head")
            yield Static(self._text, classes="text")


class Help(ModalScreen[None]):
    """Keys, commands, and how to read the panel."""

    BINDINGS = [Binding("escape,f1,q", "dismiss(None)", "Close")]

    def __init__(self, commands: Sequence[Command] = COMMANDS) -> None:
        """`commands` carry the keys that the user gave them."""
        super().__init__()
        self._text = help_markdown(commands)

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog help"):
            yield Markdown(self._text, open_links=False)
