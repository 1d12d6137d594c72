"""The prompt: a text area that sends on Enter, breaks lines on request, and recalls what was sent."""

from collections.abc import Sequence
from itertools import count

from textual import events
from textual.message import Message
from textual.widgets import TextArea

from kvchat.chat.attachments import Attachment, compose, joined, mention, mentions, parse_attachments
from kvchat.chat.session import HISTORY_LENGTH
from kvchat.text import clean
from kvchat.ui.widgets.completions import Completions

NEWLINE_KEYS = {"shift+enter", "ctrl+j", "alt+enter"}
PLACEHOLDER = "Write a message, / for a command, @ for a file"
LONG_PASTE = 8_000
"""Characters; a longer paste is shown as a mention of itself."""
ELSEWHERE = -1
"""In the place of a step back in the history: the text shown is none of it."""


def typeable(text: str) -> str:
    """What of `text` could have been typed; some terminals paste line ends as carriage returns."""
    return clean(text.replace("\r\n", "\n").replace("\r", "\n"))


class Prompt(TextArea):
    """Where the user writes."""

    class ReadAsked(Message):
        """The user wants to go to the messages above."""

    class Scrolled(Message):
        """The user wants to see what is a page above (-1) or below (1)."""

        def __init__(self, pages: int) -> None:
            super().__init__()
            self.pages = pages

    class Submitted(Message):
        """The user sent `text`."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, completions: Completions) -> None:
        """`completions` is the list that offers commands; it gets the keys that it wants first."""
        super().__init__(id="prompt", placeholder=PLACEHOLDER, compact=True)
        # a cursor that blinks wakes the program twice a second for nothing
        self.cursor_blink = False
        self._completions = completions
        self._history: list[str] = []
        self._held: dict[str, Attachment] = {}
        """Long texts that are mentioned only, by name."""
        self._recalled = 0
        """How many steps back in the history the text is; 0 is the user's own draft."""
        self._own = ""

    def set_history(self, sent: Sequence[str]) -> None:
        """What Up brings back, oldest first."""
        self._history = list(sent)
        self._recalled = 0

    def persist(self, text: str) -> None:
        """This was sent just now; what was sent before in the same words is forgotten."""
        self._history = [*(old for old in self._history if old != text), text][-HISTORY_LENGTH:]

    def load_text(self, text: str) -> None:
        """Replaces the text; an old message or a draft may hold anything, and all of it is drawn.

        Files in it are held back: what was written mentions them.
        """
        written, attached = parse_attachments(text)
        self._held = {each.name: each for each in attached}
        missing = [mention(name) for name in self._held if name not in mentions(written)]
        super().load_text(typeable(" ".join(filter(None, (written, *missing)))))

    @property
    def message(self) -> str:
        """What would be sent, with the texts that are held back."""
        return compose(self.text, [self._held[name] for name in mentions(self.text) if name in self._held])

    def give_back(self, text: str) -> None:
        """Text that could not be sent comes back, on the lines before what was typed meanwhile.

        While another text is shown instead of the user's own draft, it comes back into that draft.
        """
        if self._recalled:
            self._own = joined(text, self._own)
            return
        self.text = joined(text, self.message)
        self.move_cursor(self.document.end)

    def drop(self, text: str) -> None:
        """This was sent: where it is all that stands here, nothing does."""
        if self.message == text:
            self.text = ""

    def show_instead(self, text: str) -> None:
        """Shows another text until it is sent, or until `recall(0)` brings the user's own draft back."""
        if self._recalled == 0:
            self._own = self.message
        self._recalled = ELSEWHERE
        self.text = text
        self.move_cursor(self.document.end)

    def recall(self, back: int) -> None:
        """Shows what was sent so many messages ago; 0 brings the user's own draft back."""
        if self._recalled == 0:
            self._own = self.message
        self._recalled = back
        self.text = self._history[-back] if back else self._own
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        if self._complete(event.key):
            event.stop()
            event.prevent_default()
        elif event.key == "enter":
            event.stop()
            event.prevent_default()
            self._submit()
        elif event.key in NEWLINE_KEYS:
            event.stop()
            event.prevent_default()
            self.insert("\n")
        elif event.key == "tab":
            event.stop()
            event.prevent_default()
            self.post_message(self.ReadAsked())
        else:
            await super()._on_key(event)

    async def _on_paste(self, event: events.Paste) -> None:
        event.prevent_default()
        text = typeable(event.text)
        if len(text) > LONG_PASTE:
            # drawn letter by letter it would make every key slow; it is sent all the same
            name = next(f"pasted-{n}" for n in count(1) if f"pasted-{n}" not in self._held)
            self._held[name] = Attachment(name, text)
            row, column = self.cursor_location
            glued = self.document.get_line(row)[:column][-1:].strip()
            text = f"{' ' if glued else ''}{mention(name)} "
        await super()._on_paste(events.Paste(text))

    def action_cursor_up(self, select: bool = False) -> None:
        if not select and self.navigator.is_first_wrapped_line(self.cursor_location) and self._recall(+1):
            return
        super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        if not select and self.navigator.is_last_wrapped_line(self.cursor_location) and self._recall(-1):
            return
        super().action_cursor_down(select)

    def on_text_area_changed(self) -> None:
        """Offers what a slash word or a path may become."""
        self._completions.offer(self.text)

    def take(self, text: str) -> None:
        """Takes a completion; what comes after it is written next."""
        held = self._held
        self.text = text if text.endswith("/") else f"{text} "
        self._held = held
        self.move_cursor(self.document.end)

    def _complete(self, key: str) -> bool:
        """Whether the key was for the list of completions."""
        offered = self._completions
        offered.offer(self.text)
        if key == "tab" and (first := offered.first):
            self.take(first.text)
            return True
        if key == "enter" and (chosen := offered.chosen):
            if chosen.text.startswith("/"):
                self.text = chosen.text
                self._submit()
            else:
                self.take(chosen.text)
            return True
        return offered.dismiss(self.text) if key == "escape" else offered.step(key)

    def action_cursor_page_up(self) -> None:
        """Scrolls the conversation: the prompt itself is hardly ever higher than a page."""
        self.post_message(self.Scrolled(-1))

    def action_cursor_page_down(self) -> None:
        """Scrolls the conversation."""
        self.post_message(self.Scrolled(1))

    def _submit(self) -> None:
        text = self.message
        if text.strip():
            self._recalled = 0
            # at once: what is typed before the screen took the message belongs to the next one
            self.text = ""
            self.post_message(self.Submitted(text))

    def _recall(self, step: int) -> bool:
        """Moves through the history; False at its ends."""
        target = self._recalled + step
        if self._recalled == ELSEWHERE or not 0 <= target <= len(self._history):
            return False
        self.recall(target)
        return True
