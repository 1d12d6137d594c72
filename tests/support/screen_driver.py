"""Drives the chat the way a person does, and reads what stands on the screen."""

from asyncio import sleep, timeout
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from textual import events
from textual._compositor import Compositor
from textual.pilot import Pilot
from textual.screen import Screen
from textual.strip import Strip
from textual.widgets import Static

from kvchat.chat.conversation import Conversation, Message, title_from
from kvchat.chat.model_choice import ModelShelf
from kvchat.chat.session import ConversationDefaults, Session
from kvchat.chat.store import Store
from kvchat.contract import CacheMode
from kvchat.ui.app import ChatApp
from kvchat.ui.preferences import Preferences
from kvchat.ui.screens.chat import ChatScreen
from kvchat.ui.widgets.conversations import ConversationList, Row
from kvchat.ui.widgets.markdown import MarkdownText
from kvchat.ui.widgets.panel import CachePanel
from kvchat.ui.widgets.prompt import Prompt
from kvchat.ui.widgets.transcript import Notice, Transcript
from tests.support.scripted_engine import PATIENCE_S, Gate, ScriptedEngine

SIZE = (116, 30)
MODEL = "Scripted"
LISTED_CELLS = 31
LOOK_EVERY_S = 0.01
LOOKS = round(PATIENCE_S / LOOK_EVERY_S)
"""Counted, not timed: a machine that stands still for a while has not looked."""


def session_over(store: Store | None = None, *, mode: CacheMode = CacheMode.ON) -> Session:
    """A session with an empty conversation; without a store, everything stays in memory."""
    return Session(store or Store(None), ConversationDefaults(model="scripted", mode=mode))


def saved_conversation(store: Store, *messages: tuple[str, str], title: str = "") -> Conversation:
    """A conversation that was held before, of (role, text)."""
    session = session_over(store)
    first = messages[0][1] if messages else ""
    conversation = session.current
    store.create(Conversation(conversation.id, title or title_from(first), model="scripted"))
    parent: int | None = None
    for role, text in messages:
        finish = "stop" if role == "assistant" else None
        parent = store.add_message(
            conversation.id, Message(0, parent, role, text, "", finish_reason=finish)
        ).id
    return store.load(conversation.id)


def rendered(screen: Screen[Any]) -> list[Strip]:
    """What a screen draws, line by line."""
    return screen._compositor.render_strips()


def text_of(screen: Screen[Any]) -> str:
    """What can be read on a screen."""
    return "\n".join(strip.text.rstrip() for strip in rendered(screen))


class Chat:
    """A running chat."""

    def __init__(self, app: ChatApp, pilot: Pilot[None], session: Session, engine: ScriptedEngine) -> None:
        self.app = app
        self.pilot = pilot
        self.session = session
        self.engine = engine

    @property
    def screen(self) -> ChatScreen:
        """The chat, under whatever dialog."""
        screen = self.app.screen_stack[0]
        assert isinstance(screen, ChatScreen)
        return screen

    @property
    def prompt(self) -> Prompt:
        return self.screen.query_one(Prompt)

    @property
    def conversations(self) -> ConversationList:
        return self.screen.query_one(ConversationList)

    @property
    def transcript(self) -> Transcript:
        return self.screen.query_one(Transcript)

    @property
    def store(self) -> Store:
        return self.session._store

    def visible(self) -> str:
        """The text on the screen that has the focus."""
        return text_of(self.app.screen)

    def line(self, row: int) -> str:
        """The text in a row of the screen."""
        return self.visible().splitlines()[row]

    def panel(self) -> str:
        """The text of the panel, with what doesn't fit on the screen."""
        return str(self.screen.query_one(CachePanel).content)

    def status(self) -> str:
        return "".join(str(status.content) for status in self.screen.query("#status").results(Static))

    def shows(self, part: str) -> bool:
        """Whether a part of the screen is there."""
        return self.screen.query_one(part).display

    def title(self) -> str:
        return str(self.screen.query_one("#title", Static).content)

    def listed(self) -> list[str]:
        """The lines of the list of conversations."""
        rows = [option.prompt for option in self.conversations.options]
        return [str(row.content(LISTED_CELLS)) for row in rows if isinstance(row, Row)]

    def questions(self) -> list[str]:
        """The user's messages in the transcript."""
        return [str(text.content) for text in self.transcript.query(".user > .text").results(Static)]

    def numbers(self) -> list[str]:
        """What stands over every question in the transcript."""
        return [str(who.content) for who in self.transcript.query(".user > .who").results(Static)]

    def dimmed(self) -> list[bool]:
        """Of every message in the transcript: whether the model sees it no more."""
        return [message.has_class("left-out") for message in self.transcript.query(".message")]

    def answers(self) -> list[str]:
        """The Markdown of every answer in the transcript."""
        return [text.source for text in self.transcript.query(".answer > MarkdownText").results(MarkdownText)]

    def notes(self) -> list[str]:
        """What stands under every answer."""
        return [str(note.content) for note in self.transcript.query(".answer > .note").results(Static)]

    def notices(self) -> list[str]:
        """What the program said between the messages."""
        return [str(notice.content) for notice in self.transcript.query(Notice)]

    def figure(self, name: str) -> str:
        """A figure of the panel."""
        lines = [line.split() for line in self.panel().splitlines()]
        return next(line[1] for line in lines if line[:1] == [name])

    def compared(self) -> dict[str, list[str]]:
        """The panel's table of modes: TTFT, tokens a second and tokens of the last turn in each."""
        table = self.panel().partition("last turn in each mode")[2].splitlines()
        cells = [line.replace(" s ", " ").split() for line in table]
        return {line[0]: line[1:] for line in cells if len(line) == 4}

    def said(self) -> list[str]:
        """What the program said in passing."""
        return [notification.message for notification in self.app._notifications]

    def kept(self) -> list[tuple[str, str, str | None]]:
        """(role, text, finish reason) of the open conversation, from the store."""
        return [(m.role, m.raw, m.finish_reason) for m in self.store.load(self.session.current.id).messages]

    @property
    def left(self) -> bool:
        """Whether the program is on its way out."""
        return self.app._exit

    async def until_left(self) -> None:
        """Waits until the program is on its way out; the screen may be gone already."""
        async with timeout(PATIENCE_S):
            while not self.left:  # noqa: ASYNC110 - there is nothing else to wait for
                await sleep(0.01)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits until `condition` holds."""
        for _ in range(LOOKS):
            if condition():
                return
            if self.app._exception:
                raise self.app._exception
            await self.pilot.pause(LOOK_EVERY_S)
        pytest.fail(f"never came true: {what}\n{self.visible()}")

    async def until_said(self, words: str) -> None:
        """Waits until the program said something in passing."""
        await self.until(lambda: any(words in said for said in self.said()), f"the program says {words!r}")

    async def until_noticed(self, words: str) -> None:
        """Waits until the program said something between the messages."""
        await self.until(lambda: any(words in n for n in self.notices()), f"a notice says {words!r}")

    async def until_visible(self, words: str) -> None:
        """Waits until something can be read on the screen."""
        await self.until(lambda: words in self.visible(), f"the screen shows {words!r}")

    async def until_reached(self, gate: Gate) -> None:
        """Waits until a script stands at a gate."""
        await self.until(lambda: gate.reached, "the script comes to its gate")

    async def until_drawn(self, text: str) -> None:
        """Waits until the last answer is drawn so far."""
        await self.until(lambda: self.answers()[-1:] == [text], f"the last answer is {text!r}")

    async def until_idle(self) -> None:
        """Waits until no answer is under way."""
        await self.until(lambda: not self.screen.answering, "no answer is under way")
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)

    async def write(self, text: str) -> None:
        """Pastes text into the prompt."""
        before = self.prompt.text
        self.prompt.focus()
        self.app.post_message(events.Paste(text))
        await self.until(lambda: self.prompt.text != before, "the text is in the prompt")

    async def send(self, text: str) -> None:
        """Sends a message, or a slash command."""
        await self.write(text)
        await self.press("enter")

    async def ask(self, text: str) -> None:
        """Sends a message and waits for the end of its answer."""
        asked = len(self.engine.requests)
        await self.send(text)
        await self.until(lambda: len(self.engine.requests) > asked, "the engine is asked")
        await self.until_idle()

    async def dialog(self, kind: type[Screen[Any]]) -> None:
        """Waits until a dialog is open."""
        await self.until(lambda: isinstance(self.app.screen, kind), f"{kind.__name__} is open")
        await self.pilot.pause()


@contextmanager
def brisk() -> Iterator[None]:
    """A pilot's waits end when the messages are handled, and the screen is drawn when somebody looks.

    Waiting for a processor that rests would take most of a test's time; tests wait for what they want to see.
    Drawing for a terminal that isn't there took a third of what is left.
    """

    async def settle(min_sleep: float = 0, max_sleep: float = 0) -> None:
        await sleep(0.005)

    draw = Compositor.render_update

    def unseen(compositor: Compositor, full: bool = False, **how: Any) -> object:  # noqa: ANN401 - passed on
        if full:  # a screenshot
            return draw(compositor, full, **how)
        compositor._dirty_regions.clear()
        return None

    with (
        patch("textual.app.wait_for_idle", settle),
        patch("textual.pilot.wait_for_idle", settle),
        patch.object(Compositor, "render_update", unseen),
    ):
        yield


@asynccontextmanager
async def running(
    engine: ScriptedEngine | None = None,
    session: Session | None = None,
    *,
    size: tuple[int, int] = SIZE,
    model: str = MODEL,
    ready: bool = True,
    toasts: bool = False,
    preferences: Preferences | None = None,
    shelf: ModelShelf | None = None,
) -> AsyncIterator[Chat]:
    """A chat that runs inside the block; its engine is ready unless `ready` is false.

    `toasts` draws what the program says in passing, over whatever stands below.
    """
    engine = engine or ScriptedEngine()
    session = session or session_over()
    app = still(ChatApp(lambda: session, engine.attach, model=model, preferences=preferences, shelf=shelf))
    with brisk():
        async with app.run_test(size=size, notifications=toasts) as pilot:
            chat = Chat(app, pilot, session, engine)
            if ready:
                await chat.until(lambda: "ready" in chat.status(), "the engine is ready")
            yield chat
            if not chat.left:
                chat.visible()  # whatever the test was about, what is there now can be drawn


def still(app: ChatApp) -> ChatApp:
    """The app without anything that moves by itself."""
    app.animation_level = "none"
    return app
