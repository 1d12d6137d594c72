"""A message as it is read: who wrote it, its text, and what can be done with it by key.

Whatever a model or a user wrote is untrusted: it is cleaned of control characters, never parsed as markup,
and its raw HTML is shown as text. A message knows its place in the conversation; it refuses to know sessions
and engines.
"""

import re
import time
from collections.abc import Sequence

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalGroup
from textual.content import Content
from textual.message import Message as Event
from textual.widgets import Static

from kvchat.chat.attachments import Attachment, parse_attachments
from kvchat.chat.conversation import Message
from kvchat.chat.reasoning import ThinkingStream, inner_thinking
from kvchat.contract import FinishReason, TurnStats
from kvchat.text import clean, found_pattern, one_line
from kvchat.ui.redraw_rate import STILL, pause_after
from kvchat.ui.widgets.markdown import FOUND, MarkdownText, code_blocks, markdown_of

ENDINGS = {
    FinishReason.CANCELLED: "stopped",
    FinishReason.LENGTH: "cut at the longest answer allowed (--max-tokens)",
    FinishReason.CONTEXT: "cut where the context is full",
    FinishReason.ERROR: "cut off by an error",
}
NOT_SENT = "not sent"
"""In the place of a number: no prompt has this message."""
FOLDED_CHARACTERS, FOLDED_LINES = 8_000, 100
"""A question longer than this shows its beginning until it is unfolded: a pasted file costs layout time."""
SHOWN_CHARACTERS, SHOWN_LINES = 1_500, 20
"""Of a folded question."""


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


def folded(text: str) -> tuple[str, str]:
    """(the beginning of a text, what is said of the rest); of a short text all of it, and nothing."""
    lines = text.count("\n") + 1
    if len(text) <= FOLDED_CHARACTERS and lines <= FOLDED_LINES:
        return text, ""
    start = "\n".join(text.split("\n", SHOWN_LINES)[:SHOWN_LINES])[:SHOWN_CHARACTERS]
    return start, f"▸ {len(text) - len(start):,} more characters, {lines:,} lines in all · Enter shows them"


def chip(attachment: Attachment) -> str:
    """An attached file on one line."""
    lines = attachment.text.count("\n") + 1
    return f"▤ {one_line(attachment.name)} · {lines:,} line{'s' * (lines != 1)}"


class MessageBlock(VerticalGroup, can_focus=True):
    """One message of the transcript; the focus walks over them."""

    BINDINGS = [
        Binding("up,k", "walk(-1)", "Message before", show=False),
        Binding("down,j", "walk(1)", "Next message", show=False),
        Binding("y", "copy", "Copy", show=False),
        Binding("c", "copy_code", "Copy code", show=False),
        Binding("enter,space", "unfold", "Unfold", show=False),
        Binding("e", "edit", "Edit", show=False),
        Binding("f", "fork", "Fork here", show=False),
    ]

    class Walked(Event):
        """The user goes to the message before or after."""

        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

    class Typed(Event):
        """The user types while a message has the focus: that belongs into the prompt."""

        def __init__(self, character: str) -> None:
            super().__init__()
            self.character = character

    def __init__(self, place: int, number: int, classes: str) -> None:
        """
        Args:
            place: index among the messages of the conversation.
            number: of the question it is, or that it answers, counted from 1.
            classes: its kind, for the style sheet.
        """
        super().__init__(classes=f"message {classes}")
        self.place = place
        self.number = number
        self._code_copied = -1

    @property
    def text(self) -> str:
        """What a copy of it is."""
        raise NotImplementedError

    def highlight(self, words: Sequence[str]) -> None:
        """Marks these words where they stand."""
        raise NotImplementedError

    def action_walk(self, step: int) -> None:
        """Goes to the message before or after; the transcript knows which one that is."""
        self.post_message(self.Walked(step))

    def action_copy(self) -> None:
        """Sends the message to the clipboard."""
        self.app.copy_to_clipboard(self.text)
        self.notify("The message was sent to the clipboard.", markup=False)

    def action_copy_code(self) -> None:
        """Sends a code block to the clipboard; once more takes the next one."""
        blocks = code_blocks(self.text)
        if not blocks:
            self.notify("There is no code block in this message; Y copies all of it.", markup=False)
            return
        self._code_copied = (self._code_copied + 1) % len(blocks)
        self.app.copy_to_clipboard(blocks[self._code_copied])
        which = f"{self._code_copied + 1} of {len(blocks)} " if len(blocks) > 1 else ""
        self.notify(f"Code block {which}was sent to the clipboard.", markup=False)

    def action_unfold(self) -> None:
        """Shows what is folded, or folds it again."""

    async def action_edit(self) -> None:
        """Takes the question into the prompt."""
        await self.screen.run_action(f"run_command('edit', '{self.number}')")

    async def action_fork(self) -> None:
        """Goes on from here in another conversation."""
        await self.screen.run_action(f"run_command('fork', '{self.number}')")

    def on_key(self, event: events.Key) -> None:
        """A letter that is no key of a message begins a new one."""
        if event.is_printable and event.character and event.key not in MESSAGE_KEYS:
            event.stop()
            self.post_message(self.Typed(event.character))


MESSAGE_KEYS = {
    key for binding in MessageBlock.BINDINGS if isinstance(binding, Binding) for key in binding.key.split(",")
}


class UserMessage(MessageBlock):
    """What the user wrote, as it was written; attached files are folded into a line each."""

    class TakenBack(Event):
        """The user wants to write a message that was not sent again."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, text: str, number: int, place: int = 0, *, not_sent: bool = False) -> None:
        """`number` counts the questions of the conversation that were sent, from 1."""
        super().__init__(place, number, "user")
        self._who = Static(classes="who", markup=False)
        self.mark(number, not_sent=not_sent)
        self._raw = text
        self._written, self._attached = parse_attachments(text)
        self._unfolded = False
        self._body, self._more = Static(classes="text"), Static(classes="note attached")
        self._show()

    def compose(self) -> ComposeResult:
        yield self._who
        yield self._body
        if self._rest():
            yield self._more

    def mark(self, number: int, *, not_sent: bool) -> None:
        """Shows its number, or that it was not sent: such a message has none."""
        self.number, self._not_sent = number, not_sent
        self._who.update(f"you · {NOT_SENT if not_sent else number}")

    async def action_edit(self) -> None:
        """Takes the question into the prompt; one that was not sent replaces none."""
        if self._not_sent:
            self.post_message(self.TakenBack(self._raw))
        else:
            await super().action_edit()

    @property
    def text(self) -> str:
        """As it was sent, files and all."""
        return clean(self._raw)

    def highlight(self, words: Sequence[str]) -> None:
        """Marks the words; unfolds first, since they may stand anywhere."""
        self._unfolded = self._unfolded or bool(self._rest())
        self._show(found_pattern(words))

    def action_unfold(self) -> None:
        """Shows the whole text with its files, or the beginning only."""
        if self._rest():
            self._unfolded = not self._unfolded
            self._show()

    def _rest(self) -> list[str]:
        """What is said of the parts that are folded."""
        _, more = folded(self._written)
        return [*([more] if more else []), *(f"{chip(each)} · Enter shows it" for each in self._attached)]

    def _show(self, found: re.Pattern[str] | None = None) -> None:
        shown = self._raw if self._unfolded else folded(self._written)[0]
        rest = ["▾ Enter folds it"] if self._unfolded else self._rest()
        content = Content(clean(shown))
        self._body.update(content.highlight_regex(found, style=FOUND) if found else content)
        self._more.update(Content("\n".join(map(one_line, rest))))
        self._more.display = bool(self._rest())


class Thinking(Static):
    """What the model thought before it answered: one line, or all of it."""

    def __init__(self) -> None:
        super().__init__(classes="thinking", markup=False)
        self._text = ""
        self._over = True
        self.unfolded = False

    def show(self, text: str, *, over: bool) -> None:
        """Draws it; `over` is false while the model still thinks."""
        self._text, self._over = text, over
        self.display = bool(text.strip()) or not over
        head = "thinking" if over else "thinking …"
        count = len(text.split())
        line = f"{'▾' if self.unfolded else '▸'} {head} · {count:,} word{'s' * (count != 1)}"
        if not self.unfolded:
            self.update(Content(f"{line} · Ctrl+T shows it"))
            return
        self.update(Content(f"{line}\n{clean(text).strip()}"))

    def unfold(self, unfolded: bool) -> None:
        """Shows all of it, or the line."""
        self.unfolded = unfolded
        self.show(self._text, over=self._over)


class AnswerMessage(MessageBlock):
    """An answer: Markdown, drawn while it streams as often as that stays cheap."""

    def __init__(
        self,
        who: str,
        text: str = "",
        note: str = "",
        *,
        place: int = 0,
        number: int = 0,
        unfolded: bool = False,
    ) -> None:
        """
        Args:
            who: the model's name.
            text: the whole answer, thinking included; empty where it is going to stream.
            note: what stands under it.
            unfolded: whether thinking is shown.
        """
        super().__init__(place, number, "answer")
        self._who = who
        self._raw = text
        self._stream = ThinkingStream()
        self._answer = markdown_of(self._stream.feed(text) + self._stream.end()) if text else ""
        self._thinking = Thinking()
        self._thinking.unfolded = unfolded
        self._markdown = MarkdownText(self._answer)
        self._note = Static(Content(clean(note)), classes="note")
        self._undrawn: list[str] = []
        self._drawing = False

    @classmethod
    def of(cls, message: Message, who: str, place: int, number: int, *, unfolded: bool) -> "AnswerMessage":
        """The widget of a saved answer."""
        note = answer_note(message.stats, message.finish_reason)
        return cls(who, message.raw, note, place=place, number=number, unfolded=unfolded)

    def compose(self) -> ComposeResult:
        yield Static(Content(one_line(self._who)), classes="who")
        # an answer that is over goes on thinking no more, and a widget less is a tenth less to mount
        if self._stream.thinking or not self._raw:
            yield self._thinking
        yield self._markdown
        yield self._note

    def on_mount(self) -> None:
        """Draws the line of thinking, where there is any, and what came before it was mounted."""
        self._show_thinking()
        self._draw_soon()

    def again(self) -> "AnswerMessage":
        """The same answer as another widget, since one that was unmounted can't be mounted again."""
        unfolded = self._thinking.unfolded
        block = AnswerMessage(self._who, place=self.place, number=self.number, unfolded=unfolded)
        block.append(self._raw)
        return block

    @property
    def text(self) -> str:
        """The answer without the thinking."""
        return self._answer + "".join(self._undrawn)

    def highlight(self, words: Sequence[str]) -> None:
        """Marks the words in everything that is drawn of the answer."""
        self._markdown.mark(found_pattern(words))

    def action_unfold(self) -> None:
        """Shows the thinking of this answer, or folds it."""
        self.unfold(not self._thinking.unfolded)

    def unfold(self, unfolded: bool) -> None:
        """Shows the thinking, or one line of it."""
        self._thinking.unfold(unfolded)

    def append(self, text: str) -> None:
        """Adds streamed text; it is drawn at the next draw."""
        self._raw += text
        self._undrawn.append(markdown_of(self._stream.feed(text)))
        self._draw_soon()

    def finish(self, text: str, note: str) -> None:
        """The answer is over: draws all of it, whatever was drawn so far."""
        self._undrawn.clear()
        self._stream = ThinkingStream()
        self._answer = markdown_of(self._stream.feed(text) + self._stream.end())
        if self._markdown.source != self._answer:
            self._markdown.update(self._answer)
        self._show_thinking()
        self.say(note)

    def say(self, note: str) -> None:
        """Shows something under the answer."""
        # a new text lays the whole screen out anew, and this is called with every token
        if str(self._note.content) != clean(note):
            self._note.update(Content(clean(note)))

    def _draw_soon(self) -> None:
        """While it is not mounted, what comes is kept and nothing is drawn."""
        if self._undrawn and not self._drawing and self.is_attached:
            self._drawing = True
            self.call_later(self._draw)

    def _show_thinking(self) -> None:
        self._thinking.show(inner_thinking(self._stream.thinking), over=not self._stream.open)

    def _draw(self) -> None:
        if not self._undrawn or not self.is_attached:
            self._drawing = False
            return
        piece = "".join(self._undrawn)
        self._undrawn.clear()
        self._answer += piece
        cpu = time.process_time()
        if self._stream.thinking:
            self._show_thinking()
        if piece:
            self._markdown.append(piece)
        # the layout and the painting that this draw causes are over only after the next refresh
        self.call_after_refresh(self._rest, cpu)

    def _rest(self, cpu_before: float) -> None:
        pause = pause_after(time.process_time() - cpu_before, still=self.app.has_class(STILL))
        self.set_timer(pause, self._draw)
