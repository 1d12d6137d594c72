"""The conversation as it is read: messages, the answer that is streaming, and notices in between.

Whatever a model or a user wrote is untrusted: it is cleaned of control characters, never parsed as markup,
and its raw HTML is shown as text.
"""

import time
from collections.abc import Sequence

from markdown_it import MarkdownIt
from textual import events
from textual.app import ComposeResult
from textual.containers import VerticalGroup, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Markdown, Static

from kvchat.contract import FinishReason, TurnStats
from kvchat.conversation import Message
from kvchat.text import clean, one_line
from kvchat.ui.pace import pause_after

SHOWN_AT_ONCE = 30
"""Messages mounted when a conversation opens; earlier ones come when they are asked for."""
ENDINGS = {
    FinishReason.CANCELLED: "stopped",
    FinishReason.LENGTH: "cut at the longest answer allowed (--max-tokens)",
    FinishReason.CONTEXT: "cut where the context is full",
    FinishReason.ERROR: "cut off by an error",
}
WELCOME = """\
Write a message below: the model answers on this machine, and this conversation keeps its KV cache.

The panel on the right shows what each turn reused, what it had to read, and what that took. \
Press F4 to turn the cache off and feel what it is worth; F1 shows every key.
"""


def markdown_of(text: str) -> str:
    """An answer as Markdown to draw: cleaned, with one kind of line end.

    Textual counts lines by `str.splitlines`, its parser by `\\n`; where they part, a stream is drawn twice.
    """
    return clean(text).replace("\u2028", "\n").replace("\u2029", "\n")


def parser() -> MarkdownIt:
    """Markdown as models write it; raw HTML stays visible as text."""
    return MarkdownIt("gfm-like").disable(["html_block", "html_inline"])


def answer_note(stats: TurnStats | None, finish: str | None) -> str:
    """What stands under an answer: its figures, and how it ended if not by itself."""
    parts = []
    if stats:
        parts = [
            f"reused {stats.reused_tokens:,}",
            f"read {stats.prefilled_tokens:,}",
            f"wrote {stats.generated_tokens:,}",
            f"TTFT {stats.ttft_s:.2f} s",
            f"{stats.decode_tok_s:.1f} tok/s",
            f"cache {stats.cache_mode}",
        ]
        parts += [stats.reuse_note] if stats.reuse_note else []
    ending = "cut off by a crash" if finish is None else ENDINGS.get(FinishReason(finish), "")
    return " · ".join([*parts, ending] if ending else parts)


class UserMessage(VerticalGroup):
    """What the user wrote, as it was written."""

    def __init__(self, text: str, number: int) -> None:
        """`number` counts the questions of the conversation from 1."""
        super().__init__(classes="message user")
        self.place = -1
        self._text = text
        self._number = number

    def compose(self) -> ComposeResult:
        yield Static(f"you · {self._number}", classes="who", markup=False)
        yield Static(Content(clean(self._text)), classes="text")


class AnswerMessage(VerticalGroup):
    """An answer: Markdown, drawn while it streams as often as that stays cheap."""

    def __init__(self, who: str, text: str = "", note: str = "") -> None:
        super().__init__(classes="message answer")
        self.place = -1
        self._who = who
        self._text = markdown_of(text)
        self._note = note
        self._undrawn: list[str] = []
        self._drawing = False

    def compose(self) -> ComposeResult:
        yield Static(Content(one_line(self._who)), classes="who")
        yield Markdown(self._text or None, parser_factory=parser, open_links=False)
        yield Static(Content(clean(self._note)), classes="note")

    def append(self, text: str) -> None:
        """Adds streamed text; it is drawn at the next draw."""
        self._undrawn.append(markdown_of(text))
        if not self._drawing:
            self._drawing = True
            self.call_later(self._draw)

    async def finish(self, text: str, note: str) -> None:
        """The answer is over: draws all of it, whatever was drawn so far."""
        self._undrawn.clear()
        self._text = markdown_of(text)
        markdown = self.query_one(Markdown)
        if markdown.source != self._text:
            await markdown.update(self._text)
        self.say(note)

    def say(self, note: str) -> None:
        """Shows something under the answer."""
        self.query_one(".note", Static).update(Content(clean(note)))

    async def _draw(self) -> None:
        if not self._undrawn or not self.is_attached:
            self._drawing = False
            return
        piece = "".join(self._undrawn)
        self._undrawn.clear()
        cpu = time.process_time()
        await self.query_one(Markdown).append(piece)
        # the layout and the painting that this draw causes are over only after the next refresh
        self.call_after_refresh(self._rest, cpu)

    def _rest(self, cpu_before: float) -> None:
        self.set_timer(pause_after(time.process_time() - cpu_before), self._draw)


class Notice(Static):
    """Something the program says between messages."""

    def __init__(self, text: str, *, error: bool = False) -> None:
        super().__init__(Content(clean(text)), classes="notice error" if error else "notice")
        self.text = text


class EarlierMessages(Static):
    """Stands for the messages that are not mounted; a click brings some of them."""

    def __init__(self, count: int) -> None:
        super().__init__(Content(f"▲ {count} earlier messages"), classes="earlier")

    def on_click(self, event: events.Click) -> None:
        """Brings earlier messages."""
        event.stop()
        self.query_ancestor(Transcript).show_earlier()


class Transcript(VerticalScroll):
    """The open conversation. Follows the end unless the user scrolled up."""

    def __init__(self) -> None:
        super().__init__(id="transcript")
        self._earlier = 0
        """Messages that come before the mounted ones."""
        self._messages: list[Message] = []
        self._left_out = 0
        self.streaming: AnswerMessage | None = None

    def on_mount(self) -> None:
        """Follows the end from the start."""
        self.anchor()

    async def show(self, messages: Sequence[Message], who: str, left_out: int = 0) -> None:
        """Replaces everything by a conversation; the `left_out` oldest messages are dimmed."""
        self.streaming = None
        self._who = who
        self._messages = list(messages)
        self._left_out = left_out
        self._earlier = max(0, len(messages) - SHOWN_AT_ONCE)
        widgets = [self._widget(place) for place in range(self._earlier, len(messages))]
        if self._earlier:
            widgets.insert(0, EarlierMessages(self._earlier))
        async with self.batch():
            await self.remove_children()
            await self.mount_all(widgets or [Static(Content(WELCOME), classes="welcome")])
        self.anchor()

    def show_earlier(self) -> None:
        """Mounts some of the messages that come before."""
        end, self._earlier = self._earlier, max(0, self._earlier - SHOWN_AT_ONCE)
        self.query(EarlierMessages).remove()
        widgets: list[Widget] = [EarlierMessages(self._earlier)] if self._earlier else []
        self.mount_all([*widgets, *(self._widget(p) for p in range(self._earlier, end))], before=0)

    def leave_out(self, count: int) -> None:
        """Dims the oldest messages: the model doesn't see them any more."""
        self._left_out = max(count, self._left_out)
        shown = list(self.query(".message"))
        for widget in shown[: max(0, self._left_out - self._earlier)]:
            widget.add_class("left-out")

    async def ask(self, text: str, number: int) -> None:
        """Shows a message of the user, the `number`-th question."""
        await self.query(".welcome").remove()
        asked = UserMessage(text, number)
        asked.place = self._next_place()
        await self.mount(asked)
        self.anchor()

    async def begin_answer(self, who: str) -> None:
        """Opens the answer that will stream."""
        self.streaming = AnswerMessage(who, note="reading …")
        self.streaming.place = self._next_place()
        await self.mount(self.streaming)
        self.anchor()

    async def drop_answers_after_last_question(self) -> None:
        """Takes the last answer away before another one is written in its place."""
        for child in reversed(list(self.children)):
            if isinstance(child, UserMessage):
                return
            await child.remove()

    async def notice(self, text: str, *, error: bool = False, last: bool = True) -> None:
        """Says something below the last message; of two notices that say the same, the longer one stays.

        With `last` false it is said above the answer that streams.
        """
        if not last and self.streaming:
            await self.mount(Notice(text, error=error), before=self.streaming)
            return
        below = self.children[-1] if self.children else None
        if isinstance(below, Notice) and below.text.startswith(text):
            return
        if isinstance(below, Notice) and text.startswith(below.text):
            await below.remove()
        await self.mount(Notice(text, error=error))

    def _next_place(self) -> int:
        """Of a message that comes after all that are there."""
        placed = (child.place for child in self.children if isinstance(child, UserMessage | AnswerMessage))
        return max(placed, default=-1) + 1

    def _widget(self, place: int) -> Widget:
        message = self._messages[place]
        widget: UserMessage | AnswerMessage
        if message.role == "user":
            number = sum(m.role == "user" for m in self._messages[: place + 1])
            widget = UserMessage(message.text, number)
        else:
            note = answer_note(message.stats, message.finish_reason)
            widget = AnswerMessage(self._who, message.text, note)
        widget.place = place
        return widget.set_class(place < self._left_out, "left-out")
