"""The chat: composes the widgets and routes what they say. Sessions conduct, turns follow, widgets show."""

import gc
import time
from importlib import import_module
from pathlib import Path
from threading import Thread

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Static, TextArea

from kvchat.chat.active_turn import NotSent
from kvchat.contract import Ready
from kvchat.errors import KvchatError
from kvchat.ui.actions.answers import AnswerActions
from kvchat.ui.actions.caches import CacheActions
from kvchat.ui.actions.conversations import ConversationActions
from kvchat.ui.actions.program import ProgramActions
from kvchat.ui.commands import bindings, parse_slash
from kvchat.ui.engine_listener import tell
from kvchat.ui.messages import EngineStatus, TurnProgress
from kvchat.ui.widgets.completions import Completions
from kvchat.ui.widgets.conversations import ConversationList
from kvchat.ui.widgets.key_hints import KeyLine
from kvchat.ui.widgets.message import MessageBlock, UserMessage
from kvchat.ui.widgets.panel import CachePanel
from kvchat.ui.widgets.prompt import Prompt
from kvchat.ui.widgets.prompt_cost import ReckoningLine
from kvchat.ui.widgets.status import StatusLine
from kvchat.ui.widgets.strip import ReuseStrip
from kvchat.ui.widgets.transcript import Transcript

SOON_S = 0.01
"""Not 0: Textual divides by a timer's seconds where the timer comes late, as on a busy machine."""
RECKON_AFTER_S = 0.3
"""The engine is asked this long after the last key what the text would cost."""
DRAFT_AFTER_S = 1.0
"""An unsent prompt is saved this long after the last key."""
PANEL_EVERY_S = 1.0
"""The figures are drawn this often at most while an answer streams."""
DRAWING = "kvchat.ui.widgets.markdown_layout"
"""What draws answers; heavy, and not needed before there is one."""
SELDOM = 50
"""Searches among younger objects for each one among all."""
NONE_YET = "None yet. The first message starts one; it is kept here, with its cache."


def prepare_drawing() -> None:
    """Imports what draws answers, so that it is there by the time that the model answers.

    What is there by then stays: searches for garbage that walk through all of it are pauses that can be seen.
    And those that walk through everything else are left to the transcript, which has calm moments for them.
    """
    import_module(DRAWING)
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, SELDOM)


class ChatScreen(ConversationActions, AnswerActions, CacheActions, ProgramActions):
    """Conversations on the left, the transcript and the prompt in the middle, the cache on the right."""

    BINDINGS = bindings()
    AUTO_FOCUS = "#prompt"

    def compose(self) -> ComposeResult:
        yield StatusLine()
        with Horizontal(id="body"):
            with Vertical(id="side"):
                yield Static("conversations", classes="head")
                yield Static(NONE_YET, id="none-yet")
                yield ConversationList(id="conversations")
            with Vertical(id="middle"):
                yield Static(id="title", classes="head")
                transcript = Transcript()
                with Horizontal(id="reading"):
                    yield ReuseStrip(transcript)
                    yield transcript
                yield self._completions
                yield self._prompt
                yield ReckoningLine()
            with Vertical(id="panel"):
                yield Static("cache", classes="head")
                with VerticalScroll(can_focus=False):
                    yield CachePanel()
        yield KeyLine(self._commands)

    def on_mount(self) -> None:
        """Paints first; what takes longer comes after."""
        self.call_after_refresh(self._begin)

    async def _begin(self) -> None:
        """Opens the session and starts the engine."""
        try:
            self._session = self._open_session()
        except KvchatError as error:
            self.app.exit(return_code=1, message=f"kvchat: {error}")
            return
        self._bridge.start()  # takes longest: the rest is done meanwhile
        self._gather()
        self._begun = True
        self._prompt.set_history(self._session.history())
        await self._opened(typed=self._prompt.text)
        if self.first_command:
            await self.run_action(self.first_command)
        Thread(target=prepare_drawing, daemon=True, name="drawing").start()

    def _gather(self) -> None:
        """Makes who works with the session; imported here, since nothing of it is painted first."""
        from kvchat.ui.cache_actions import CacheDesk
        from kvchat.ui.conversation_files import Archive
        from kvchat.ui.inspectors import Views
        from kvchat.ui.model_switch import ModelDesk
        from kvchat.ui.prompt_cost import Reckoner
        from kvchat.ui.turn_presenter import Turns

        transcript = self.query_one(Transcript)
        self._turns = Turns(self._session, self._bridge, transcript, self._model, self._give_back)
        self._desk = CacheDesk(
            self._session, self._bridge, lambda: self._turns.warm, self._say, self._confirm
        )
        self._views = Views(self.app, self._session, self._bridge, self._turns, self._desk)
        self._archive = Archive(self._session, self._say)
        self._reckoner = Reckoner(self._session, self._bridge, self.query_one(ReckoningLine).show, Path.cwd())
        if self._shelf:
            self._models = ModelDesk(
                self._session, self._bridge, self._shelf, self._say, self._download_went_on
            )

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Commands wait until the session is open."""
        return self._begun

    def leave(self) -> None:
        """Saves what isn't saved and ends the engine; once."""
        if self._has_left:
            return
        self._has_left = True
        if self._begun:
            if self._shelf:
                self._models.close()
            self._save_draft()
            with self._telling():
                self._views.end_tour()
                if not_sent := self._session.abandon_turn():
                    self._session.keep_for_later(not_sent)
        self._bridge.close()

    def _give_back(self, question: NotSent) -> None:
        """Takes a question that was not sent into the prompt, before what was typed meanwhile."""
        if self._turns.editing is None and not self._prompt.message.strip():
            self._turns.editing = question.edited
        self._prompt.give_back(question.text)

    @on(UserMessage.TakenBack)
    def _taken_back(self, message: UserMessage.TakenBack) -> None:
        self._prompt.give_back(message.text)
        self._prompt.focus()

    @on(EngineStatus)
    async def _engine_status(self, message: EngineStatus) -> None:
        if self._reckoner.on_status(message.status):
            return
        if isinstance(message.status, Ready):
            self._reckon()
        with self._telling():
            await self._turns.on_status(message.status)
        with self._telling():
            self._desk.on_status(message.status)
        tell(self.app.screen_stack, message.status)
        with self._telling():
            self._refresh_all()

    @on(TurnProgress)
    async def _turn_progress(self, message: TurnProgress) -> None:
        was_answering = self._turns.answering
        with self._telling():
            await self._turns.on_event(message.event)
        tell(self.app.screen_stack, message.event)
        with self._telling():
            if was_answering and not self._turns.answering:
                self._refresh_all()
                self._reckon()
            elif self._turns.answering and self._figures_timer is None:
                wait = PANEL_EVERY_S - (time.monotonic() - self._figures_at)
                self._figures_timer = self.set_timer(max(SOON_S, wait), self._refresh_figures)

    @on(Prompt.Submitted)
    async def _submitted(self, message: Prompt.Submitted) -> None:
        if not self._begun:
            self._prompt.give_back(message.text)
            return
        try:
            if message.text.startswith("/") and (parsed := parse_slash(message.text)):
                command, argument = parsed
                await self.run_action(f"{command.name}({argument!r})" if argument else command.name)
            elif message.text.startswith("/") and "\n" not in message.text:
                self._prompt.give_back(message.text)
                self._say(f"There is no command {message.text.split()[0]}. F1 lists them.")
            else:
                # before sending: the first message gives the conversation, and so its draft, another key
                text = self._reckoner.composed(message.text)
                self._save_draft()
                await self._turns.send(text)
                self._prompt.persist(text)
                self._refresh_all()
        except KvchatError as error:
            self._prompt.give_back(message.text)
            self._say(str(error))

    @on(Prompt.ReadAsked)
    def _read_asked(self) -> None:
        self.query_one(Transcript).focus_last()

    @on(Prompt.Scrolled)
    def _scrolled(self, message: Prompt.Scrolled) -> None:
        self.query_one(Transcript).scroll_page(message.pages)

    @on(MessageBlock.Typed)
    def _typed_elsewhere(self, message: MessageBlock.Typed) -> None:
        self._prompt.focus()
        self._prompt.insert(message.character)

    @on(TextArea.Changed)
    def _prompt_changed(self) -> None:
        if not self._begun:
            return
        for timer in (self._draft_timer, self._reckon_timer):
            if timer:
                timer.stop()
        self._draft_timer = self.set_timer(DRAFT_AFTER_S, self._save_draft)
        self._reckon_timer = self.set_timer(RECKON_AFTER_S, self._reckon)

    @on(Completions.Taken)
    def _completion_taken(self, message: Completions.Taken) -> None:
        self._prompt.take(message.completion.text)
        self._prompt.focus()
