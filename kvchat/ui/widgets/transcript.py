"""The conversation as it is read: a window over its messages, the answer that is streaming, and notices.

Of a long conversation only the messages around what is read are mounted; others come when the view comes
near them, whether by mouse or by key.
"""

import gc
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from textual.containers import VerticalScroll
from textual.content import Content
from textual.layout import WidgetPlacement
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Static

from kvchat.chat.conversation import Message
from kvchat.errors import KvchatError
from kvchat.text import clean
from kvchat.ui.widgets.message import AnswerMessage, MessageBlock, UserMessage
from kvchat.ui.widgets.welcome import Welcome

P = ParamSpec("P")
SHOWN_AT_ONCE = 12
"""Messages mounted when a conversation opens."""
STEP = 4
"""Messages mounted at least when the view comes near the edge of what is mounted."""
KEPT_VIEWS = 2
"""Messages further from the view than so many of its heights are unmounted: layouts take all others along."""
CALM_S = 1.5
"""So long after the last scrolling, memory is searched for what is left of unmounted messages."""
MOUNTED_AT_MOST = 40
"""In a conversation that grows while its end is followed."""


def one_at_a_time(
    change: Callable[Concatenate["Transcript", P], Awaitable[None]],
) -> Callable[Concatenate["Transcript", P], Coroutine[Any, Any, None]]:
    """A change of what is mounted waits for the one before it: keys, turns and scrolling all make some."""

    @wraps(change)
    async def locked(transcript: "Transcript", /, *args: P.args, **kwargs: P.kwargs) -> None:
        async with transcript.lock:
            await change(transcript, *args, **kwargs)

    return locked


class Notice(Static):
    """Something the program says between messages."""

    def __init__(self, text: str, *, error: bool = False) -> None:
        super().__init__(Content(clean(text)), classes="notice error" if error else "notice")
        self.text = text


class Unmounted(Static):
    """Stands for the messages before or after the mounted ones, until they are mounted."""

    ARROW = ""
    WORD = ""

    def __init__(self) -> None:
        super().__init__(classes="earlier", markup=False)

    def count(self, messages: int) -> None:
        """Says how many there are; of none, nothing."""
        self.display = messages > 0
        self.update(Content(f"{self.ARROW} {messages:,} {self.WORD} message{'s' * (messages != 1)}"))


class EarlierMessages(Unmounted):
    """Those before."""

    ARROW, WORD = "▲", "earlier"


class LaterMessages(Unmounted):
    """Those after."""

    ARROW, WORD = "▼", "later"


class Transcript(VerticalScroll, can_focus=False):
    """The open conversation. Follows the end unless the user scrolled up."""

    def __init__(self) -> None:
        super().__init__(id="transcript")
        self._messages: list[Message] = []
        self._numbers: list[int] = []
        """For each message, the number of the question that it is or answers; questions that were not sent
        have the number of the one before."""
        self._window = range(0)
        """Places of the mounted messages; the streaming answer comes after the last one."""
        self._evicted_messages = 0
        self._who = ""
        self._moving = False
        """Whether messages are being mounted and unmounted."""
        self._looking_ahead = False
        """Whether they are going to be, after the next painting."""
        self._calm: Timer | None = None
        self._held: tuple[Widget, int] | None = None
        """(a message, the row of the view that it begins in after the next layout)."""
        self._earlier, self._later = EarlierMessages(), LaterMessages()
        self.unfolded = False
        """Whether the thinking of answers is shown."""
        self.streaming: AnswerMessage | None = None

    def on_mount(self) -> None:
        """Follows the end from the start."""
        self.anchor()

    @one_at_a_time
    async def show(self, messages: Sequence[Message], who: str, evicted_messages: int = 0) -> None:
        """Replaces everything by a conversation; the `evicted_messages` oldest messages are dimmed."""
        self.streaming = None
        self._who = who
        self._evicted_messages = evicted_messages
        self._learn(messages)
        await self._show_window(len(messages) - SHOWN_AT_ONCE, len(messages))
        self.anchor()

    @one_at_a_time
    async def settle(self, messages: Sequence[Message]) -> None:
        """These are the messages now that a turn is over: what streamed is one of them."""
        at_end = self._window.stop == len(self._messages)
        self._learn(messages)
        if at_end:
            self._window = range(min(self._window.start, len(messages)), len(messages))
        self._mark_questions()
        self._count()

    @one_at_a_time
    async def show_earlier(self) -> None:
        """Mounts some of the messages that come before."""
        end = self.scroll_y + (1 + KEPT_VIEWS) * self.size.height
        kept = [block.place for block in self._blocks() if block.virtual_region.y < end]
        # the answer that streams stands after the last message: that one stays
        stop = self._window.stop if self._streams_here or not kept else kept[-1] + 1
        await self._move(max(0, self._window.start - self._screenful), stop)

    @one_at_a_time
    async def show_later(self) -> None:
        """Mounts some of the messages that come after."""
        start = self.scroll_y - KEPT_VIEWS * self.size.height
        kept = [block.place for block in self._blocks() if block.virtual_region.bottom > start]
        stop = min(len(self._messages), self._window.stop + self._screenful)
        await self._move(kept[0] if kept else self._window.start, stop)

    @one_at_a_time
    async def show_end(self) -> None:
        """Mounts the last messages, where the view is elsewhere, and follows the end."""
        if self._window.stop < len(self._messages):
            await self._show_window(len(self._messages) - SHOWN_AT_ONCE, len(self._messages))
        self.anchor()

    @one_at_a_time
    async def go_to(self, place: int, words: Sequence[str] = ()) -> None:
        """Shows a message, with the focus on it and these words marked in it."""
        if not 0 <= place < len(self._messages):
            return
        if place not in self._window:
            start = max(0, place - SHOWN_AT_ONCE // 2)
            await self._show_window(start, start + SHOWN_AT_ONCE)
        block = next((block for block in self._blocks() if block.place == place), None)
        if block is None:
            return
        if words:
            block.highlight(words)
        self.screen.set_focus(block, scroll_visible=False)
        self._hold(block, row=1)

    def leave_out(self, count: int) -> None:
        """Dims the oldest messages: the model doesn't see them any more."""
        self._evicted_messages = max(count, self._evicted_messages)
        for block in self._blocks():
            block.set_class(block.place < self._evicted_messages, "left-out")

    def unfold_thinking(self, unfolded: bool) -> None:
        """Shows or folds what the model thought before its answers."""
        self.unfolded = unfolded
        for answer in self.query(AnswerMessage):
            answer.unfold(unfolded)

    def focus_last(self) -> bool:
        """Gives the focus to the last message that can be seen; False where there is none."""
        bottom = self.scroll_y + self.size.height
        seen = [block for block in self._blocks() if block.virtual_region.y < bottom]
        if seen:
            self.screen.set_focus(seen[-1], scroll_visible=False)
        return bool(seen)

    @property
    def chosen(self) -> MessageBlock:
        """The message that has the focus, else the last answer.

        Raises:
            KvchatError: there is neither.
        """
        blocks = self._blocks()
        answers = [block for block in blocks if isinstance(block, AnswerMessage)]
        focused = [block for block in blocks if block.has_focus]
        if not focused + answers:
            raise KvchatError("There is no answer to copy yet.")
        return (focused or answers)[-1]

    def scroll_page(self, pages: int) -> None:
        """Scrolls a page up (-1) or down (1), at once: an animation would draw all of it in each frame."""
        rows = pages * self.scrollable_content_region.height
        if self._held:  # a layout is under way that scrolls
            block, row = self._held
            self._held = (block, row - rows)
        else:
            self.scroll_to(y=self.scroll_y + rows, animate=False, immediate=True)
        # at the edge of what is mounted nothing moves, and more is to come all the same
        self._look_ahead()

    @one_at_a_time
    async def ask(self, messages: Sequence[Message]) -> None:
        """Shows the last of these, a message of the user that was just sent."""
        await self.query(".welcome").remove()
        await self.show_end()
        self._learn(messages)
        self._window = range(self._window.start, len(messages))
        await self.mount(self._block(len(messages) - 1), before=self._later)
        await self._drop_oldest()
        self.anchor()

    @one_at_a_time
    async def begin_answer(self, who: str) -> None:
        """Opens the answer that will stream."""
        await self.show_end()
        place = len(self._messages)
        number = self._numbers[-1] if self._numbers else 0
        self.streaming = AnswerMessage(
            who, note="reading …", place=place, number=number, unfolded=self.unfolded
        )
        await self.mount(self.streaming, before=self._later)
        self.anchor()

    @one_at_a_time
    async def drop_answers_after_last_question(self, messages: Sequence[Message]) -> None:
        """Takes what comes after the last question of these away, before an answer is written there."""
        await self.show_end()
        last = max((place for place, m in enumerate(messages) if m.role == "user"), default=-1)
        self._learn(messages[: last + 1])
        self._window = range(min(self._window.start, last + 1), last + 1)
        for child in reversed(list(self.children)):
            if isinstance(child, UserMessage) and child.place <= last:
                break
            if isinstance(child, MessageBlock | Notice):
                await child.remove()
        self._mark_questions()

    @one_at_a_time
    async def drop(self, block: AnswerMessage) -> None:
        """Takes an answer away of which nothing was written."""
        if block.is_attached:
            await block.remove()

    @one_at_a_time
    async def notice(self, text: str, *, error: bool = False, last: bool = True) -> None:
        """Says something below the last message; of two notices that say the same, the longer one stays.

        With `last` false it is said above the answer that streams.
        """
        if not last and self._streams_here:
            await self.mount(Notice(text, error=error), before=self.streaming)
            return
        said = [child for child in self.children if child is not self._later]
        below = said[-1] if said else None
        if isinstance(below, Notice) and below.text.startswith(text):
            return
        if isinstance(below, Notice) and text.startswith(below.text):
            await below.remove()
        await self.mount(Notice(text, error=error), before=self._later)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Brings messages before the view comes to the edge of what is mounted."""
        super().watch_scroll_y(old_value, new_value)
        if self._calm:
            self._calm.reset()
        self._look_ahead()

    def process_layout(self, placements: list[WidgetPlacement]) -> list[WidgetPlacement]:
        """Scrolls to the message that is held, once its place is known and before anything is painted.

        Scrolling after the layout would show the text in two places, one frame after the other.
        """
        held, row = self._held or (None, 0)
        for placement in placements:
            if placement.widget is held:
                self._held = None
                top = max(0, placement.region.y - row)
                # set, not assigned: the layout under way sees it, and asks for no other one
                self.set_reactive(Widget.scroll_y, top)
                self.set_reactive(Widget.scroll_target_y, top)
                self.vertical_scrollbar.position = top
        return super().process_layout(placements)

    def action_scroll_home(self) -> None:
        """Goes to the first message of all."""
        self.call_later(self.go_to, 0)

    def action_scroll_end(self) -> None:
        """Goes to the end, and follows it."""
        self.call_later(self.show_end)

    async def on_message_block_walked(self, event: MessageBlock.Walked) -> None:
        """Scrolls inside a message that is higher than the view; else goes to the next one."""
        event.stop()
        blocks, step = self._blocks(), event.step
        # keys may come faster than the focus moves: where it is now counts
        block = next((block for block in blocks if block.has_focus), None)
        if block is None:
            return
        region, top = block.virtual_region, self.scroll_y
        beyond = region.bottom - (top + self.size.height) if step > 0 else top - region.y
        if beyond > 0:
            self.scroll_relative(y=step * min(beyond, max(1, self.size.height // 3)), animate=False)
            return
        following = blocks.index(block) + step
        if not 0 <= following < len(blocks):
            await (self.show_later() if step > 0 else self.show_earlier())
            blocks = self._blocks()
            following = blocks.index(block) + step if block in blocks else -1
        if 0 <= following < len(blocks):
            self.screen.set_focus(blocks[following], scroll_visible=False)
            # one that was just mounted has no place before the next layout
            bring = self._bring_into_view if blocks[following].region else self._bring_when_laid_out
            bring(blocks[following], step)
        elif step > 0:
            self.screen.query_one("#prompt").focus()

    def _learn(self, messages: Sequence[Message]) -> None:
        self._messages = list(messages)
        self._numbers, number = [], 0
        for message in messages:
            number += message.role == "user" and not message.not_sent
            self._numbers.append(number)

    def _mark_questions(self) -> None:
        """Shows at the mounted questions whether they were sent."""
        for block in self._blocks():
            if isinstance(block, UserMessage) and block.place < len(self._messages):
                block.mark(self._numbers[block.place], not_sent=self._messages[block.place].not_sent)

    def _blocks(self) -> list[MessageBlock]:
        return [child for child in self.children if isinstance(child, MessageBlock)]

    def _block(self, place: int) -> MessageBlock:
        message, number = self._messages[place], self._numbers[place]
        block: MessageBlock
        if message.role == "user":
            block = UserMessage(message.text, number, place, not_sent=message.not_sent)
        else:
            block = AnswerMessage.of(message, self._who, place, number, unfolded=self.unfolded)
        return block.set_class(place < self._evicted_messages, "left-out")

    async def _show_window(self, start: int, stop: int) -> None:
        """Mounts these messages and nothing else."""
        self._window = range(max(0, start), min(stop, len(self._messages)))
        self._earlier, self._later = EarlierMessages(), LaterMessages()
        blocks: list[Widget] = [self._block(place) for place in self._window]
        self._moving = True
        try:
            async with self.batch():
                await self._unmount(self.children)
                shown = blocks + self._streaming_again() or [Welcome()]
                await self.mount_all([self._earlier, *shown, self._later])
            self._count()
        finally:
            self._moving = False
        self.call_after_refresh(self._look_ahead)

    async def _move(self, start: int, stop: int) -> None:
        """Mounts these messages instead of the mounted ones; what is read stays where it is on the screen."""
        if self._moving or range(start, stop) == self._window:
            return
        self._moving = True
        try:
            # the end of what is mounted is not what the user follows where more comes after it
            follows = self._follows_end and self._window.stop == len(self._messages)
            before = [self._block(place) for place in range(start, self._window.start)]
            after = [self._block(place) for place in range(self._window.stop, stop)]
            self._window = range(start, stop)
            after += self._streaming_again()
            self._count()
            async with self.batch():
                await self._unmount(self._outside())
                await self.mount_all(before, after=self._earlier)
                await self.mount_all(after, before=self._later)
                # now, since the user may have scrolled meanwhile
                if not follows and (read := self._in_view()):
                    self._hold(read, row=read.virtual_region.y - self.scroll_offset.y)
        finally:
            self._moving = False

    async def _unmount(self, widgets: Iterable[Widget]) -> None:
        """Removes widgets that won't be seen again."""
        gone = list(widgets)
        for widget in gone:
            # Textual remembers the caches of the last thousand widgets: what is drawn in these would stay in
            # memory, and every search for garbage would walk through it
            for each in widget.walk_children(with_self=True):
                each.refresh()
        await self.remove_children(gone)
        # now would be a pause of a tenth of a second in mid-scroll; in a thread, it would be one as well
        self._calm = self._calm or self.set_timer(CALM_S, self._collect)

    def _collect(self) -> None:
        self._calm = None
        gc.collect()

    def _hold(self, block: MessageBlock, row: int) -> None:
        """Lets a message begin in this row of the view, whatever is mounted above it."""
        self.release_anchor()
        self._held = (block, row)
        block.refresh(layout=True)

    @property
    def _screenful(self) -> int:
        """About how many messages fill the view."""
        rows = max(1, self.virtual_size.height // max(1, len(self._window)))
        return min(SHOWN_AT_ONCE, max(STEP, self.size.height // rows))

    @property
    def _follows_end(self) -> bool:
        return self.is_anchored and not self._anchor_released

    def _outside(self) -> Iterable[Widget]:
        """What is mounted around messages that are no longer in the window; notices go with them."""
        streaming = self.streaming
        children = [child for child in self.children if not isinstance(child, Unmounted)]
        places = [child.place for child in children if isinstance(child, MessageBlock)]
        for child in children:
            if isinstance(child, MessageBlock) and child is not streaming and child.place not in self._window:
                yield child
        if places and streaming is None and self._window.stop < len(self._messages):
            yield from (child for child in children if isinstance(child, Notice))

    @property
    def _streams_here(self) -> bool:
        return self.streaming is not None and self.streaming.is_attached

    def _streaming_again(self) -> list[MessageBlock]:
        """The answer that streams, where the window comes to the end and it isn't mounted."""
        if self.streaming is None or self._streams_here or self._window.stop < len(self._messages):
            return []
        self.streaming = self.streaming.again()
        return [self.streaming]

    async def _drop_oldest(self) -> None:
        """Unmounts the oldest messages of a conversation that grows while its end is followed."""
        if len(self._window) > MOUNTED_AT_MOST:
            await self._move(self._window.stop - SHOWN_AT_ONCE, self._window.stop)

    def _look_ahead(self) -> None:
        if self._moving or self._looking_ahead or not self.is_attached or not self.size.height:
            return
        margin = self.size.height
        if self.scroll_y < margin and self._window.start > 0:
            self._look_after_painting(self.show_earlier)
        elif self.max_scroll_y - self.scroll_y < margin and self._window.stop < len(self._messages):
            self._look_after_painting(self.show_later)

    def _look_after_painting(self, show: Callable[[], Awaitable[None]]) -> None:
        """Brings messages once what was scrolled is painted, and more of them where those were short."""
        self._looking_ahead = True

        async def bring() -> None:
            self._looking_ahead = False
            await show()
            self.call_after_refresh(self._look_ahead)

        self.call_after_refresh(bring)

    def _in_view(self) -> MessageBlock | None:
        """The message that the top of the view is in."""
        top = self.scroll_y
        return next((block for block in self._blocks() if block.virtual_region.bottom > top), None)

    def _bring_into_view(self, block: MessageBlock, step: int) -> None:
        """Shows a message that was walked to; of one higher than the view, the end that comes first."""
        region = block.virtual_region
        top, bottom = region.y, region.bottom - self.size.height
        if step < 0 and (region.y < self.scroll_y or region.height > self.size.height):
            self.scroll_to(y=max(top, bottom) if region.height > self.size.height else top, animate=False)
        elif step > 0 and bottom > self.scroll_y:
            self.scroll_to(y=min(top, bottom), animate=False)

    def _bring_when_laid_out(self, block: MessageBlock, step: int) -> None:
        self.call_after_refresh(self._bring_into_view, block, step)

    def _count(self) -> None:
        """Says how many messages are not mounted."""
        self._earlier.count(self._window.start)
        self._later.count(len(self._messages) - self._window.stop)
