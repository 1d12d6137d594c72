"""The chat: composes the widgets, passes keys, lines and events on to the controller, and draws its state."""

import gc
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import isawaitable
from threading import Thread
from typing import TYPE_CHECKING

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Static, TextArea

from kvchat.chat.active_turn import NotSent
from kvchat.chat.commands import COMMANDS, parse_slash, remapped
from kvchat.chat.conversation_commands import ask_delete, open_conversation, set_title
from kvchat.chat.engine_supervisor import EngineSupervisor
from kvchat.chat.port import EngineEvent, EngineFactory
from kvchat.chat.session import Session
from kvchat.contract import Ready, TurnEvent
from kvchat.errors import KvchatError
from kvchat.models.cards import load_cards
from kvchat.text import clean
from kvchat.ui.engine_listener import tell
from kvchat.ui.key_bindings import bindings
from kvchat.ui.messages import EngineReported
from kvchat.ui.preferences import Preferences
from kvchat.ui.themes import NAMES
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

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController
    from kvchat.chat.model_choice import ModelShelf
    from kvchat.ui.inspectors import Inspectors
    from kvchat.ui.state_view import StateView
    from kvchat.ui.turn_presenter import TurnPresenter

RECKON_AFTER_S = 0.3
"""The engine is asked this long after the last key what the text would cost."""
DRAFT_AFTER_S = 1.0
"""An unsent prompt is saved this long after the last key."""
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


class ChatScreen(Screen[None]):
    """Conversations on the left, the transcript and the prompt in the middle, the cache on the right."""

    BINDINGS = bindings()
    AUTO_FOCUS = "#prompt"

    controller: "ChatController"
    """Made after the first paint, as the three below."""
    presenter: "TurnPresenter"
    inspectors: "Inspectors"
    state_view: "StateView"

    def __init__(
        self,
        open_session: Callable[[], Session],
        factory: EngineFactory,
        model: str,
        preferences: Preferences,
        shelf: "ModelShelf | None",
    ) -> None:
        """Without a `shelf` there is one model, and no other to choose."""
        super().__init__()
        self._open_session = open_session
        self.preferences = preferences
        self._shelf = shelf
        self._model = model
        self.commands = remapped(preferences.keys)
        self.first_command = ""
        """What is done as soon as the session is open."""
        self._begun = False
        """Whether the session is open; until then there is nothing to act on."""
        self._has_left = False
        self.engine = EngineSupervisor(factory, self._post)
        self._completions = Completions(self._words)
        self.prompt = Prompt(self._completions)
        self._draft_timer: Timer | None = None
        self._reckon_timer: Timer | None = None

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
                yield self.prompt
                yield ReckoningLine()
            with Vertical(id="panel"):
                yield Static("cache", classes="head")
                with VerticalScroll(can_focus=False):
                    yield CachePanel()
        yield KeyLine(self.commands)

    # --- beginning and end --------------------------------------------------------------------------------

    def on_mount(self) -> None:
        """Paints first; what takes longer comes after."""
        self.call_after_refresh(self._begin)

    async def _begin(self) -> None:
        """Opens the session and starts the engine."""
        try:
            session = self._open_session()
        except KvchatError as error:
            self.app.exit(return_code=1, message=f"kvchat: {error}")
            return
        self.engine.start()  # takes longest: the rest is done meanwhile
        self._make_controller(session)
        self._begun = True
        self.prompt.set_history(session.history())
        await self.controller.opened()
        if self.first_command:
            await self.action_run_command(self.first_command)
        Thread(target=prepare_drawing, daemon=True, name="drawing").start()

    def _make_controller(self, session: Session) -> None:
        """Imported here, since nothing of it is painted first."""
        from kvchat.chat.controller import ChatController
        from kvchat.chat.model_choice import Models
        from kvchat.ui.inspectors import Inspectors
        from kvchat.ui.screen_port import ScreenPort
        from kvchat.ui.state_view import StateView
        from kvchat.ui.turn_presenter import TurnPresenter

        models = Models(self._shelf, self.say, self._download_went_on) if self._shelf else None
        port = ScreenPort(self)
        port.typed = self.prompt.text
        self.controller = ChatController(session, self.engine, port, self._model, models)
        self.presenter = TurnPresenter(self.controller, self.query_one(Transcript))
        self.inspectors = Inspectors(self)
        self.state_view = StateView(self)

    def leave(self) -> None:
        """Saves what isn't saved and ends the engine; once."""
        if self._has_left:
            return
        self._has_left = True
        if not self._begun:
            self.engine.close()
            return
        self.save_draft()
        try:
            self.inspectors.end_tour()
        except KvchatError as error:
            self.say(str(error))
        self.controller.close()

    # --- commands and lines -------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Commands wait until the session is open."""
        return self._begun

    async def action_run_command(self, name: str, argument: str = "") -> None:
        """Does a command."""
        command = next(command for command in COMMANDS if command.name == name)
        await self.controller.run(command, argument)
        self.refresh_all()

    @on(Prompt.Submitted)
    async def _submitted(self, message: Prompt.Submitted) -> None:
        text = message.text
        if not self._begun:
            self.prompt.give_back(text)
        elif text.startswith("/") and (parsed := parse_slash(text)):
            await self.action_run_command(parsed[0].name, parsed[1])
        elif text.startswith("/") and "\n" not in text:
            self.prompt.give_back(text)
            self.say(f"There is no command {text.split()[0]}. F1 lists them.")
        else:
            await self._send(text)

    async def _send(self, written: str) -> None:
        try:
            text = self.controller.prompt_cost.composed(written)
            # before sending: the first message gives the conversation, and so its draft, another key
            self.save_draft()
            await self.controller.send(text)
            self.prompt.persist(text)
            self.refresh_all()
        except KvchatError as error:
            self.prompt.give_back(written)
            self.say(str(error))

    @on(ConversationList.Opened)
    async def _conversation_opened(self, message: ConversationList.Opened) -> None:
        await self._do(open_conversation, message.conversation)

    @on(ConversationList.Renamed)
    async def _renamed(self, message: ConversationList.Renamed) -> None:
        await self._do(set_title, message.conversation, message.title)

    @on(ConversationList.DeleteAsked)
    async def _delete_asked(self, message: ConversationList.DeleteAsked) -> None:
        await self._do(ask_delete, message.conversation)

    async def _do(self, act: Callable[..., object], *given: str) -> None:
        """Acts with the controller; what can't be done is said."""
        try:
            done = act(self.controller, *given)
            if isawaitable(done):
                await done
            self.refresh_all()
        except KvchatError as error:
            self.say(str(error))

    async def on_tour_card_ended(self) -> None:
        """Goes back to the conversations."""
        await self.query("#tour").remove()
        self.inspectors.end_tour()
        await self._do(lambda controller: controller.opened())
        self.prompt.focus()

    # --- the engine ---------------------------------------------------------------------------------------

    def _post(self, event: EngineEvent) -> None:
        """Takes an event from a thread of the engine."""
        self.post_message(EngineReported(event))

    @on(EngineReported)
    async def _engine_reported(self, message: EngineReported) -> None:
        controller, event = self.controller, message.event
        before, pending = controller.state, controller.answering
        state = controller.on_event(event)
        await self.presenter.on_event(event, pending, before)
        if state.not_sent and state.not_sent is not before.not_sent:
            self._give_back(state.not_sent)
        tell(self.app.screen_stack, event)
        if not isinstance(event, TurnEvent) or (pending and not controller.answering):
            self.refresh_all()
        elif controller.answering:
            self.state_view.draw_figures_soon()
        if isinstance(event, Ready) or (pending and not controller.answering):
            self._reckon()

    def _give_back(self, question: NotSent) -> None:
        """Takes a question that was not sent into the prompt, before what was typed meanwhile."""
        if self.controller.editing is None and not self.prompt.message.strip():
            self.controller.editing = question.edited
        self.prompt.give_back(question.text)

    def _download_went_on(self) -> None:
        from kvchat.ui.screens.models import ModelScreen

        for screen in self.app.screen_stack:
            if isinstance(screen, ModelScreen) and screen.is_mounted:
                screen.show()

    # --- drawing ------------------------------------------------------------------------------------------

    @property
    def answering(self) -> bool:
        """Whether an answer is under way."""
        return self._begun and self.controller.answering is not None

    def refresh_all(self) -> None:
        """Draws everything but the transcript."""
        self.state_view.draw()

    def toggle(self, part: str, shown: bool | None = None) -> None:
        """Shows or hides the list or the panel."""
        widget = self.query_one(f"#{part}")
        shown = not widget.display if shown is None else shown
        if shown and (self.has_class("-medium") or self.has_class("-narrow", "-short")):
            # there is room for one of them beside the words
            self.remove_class("show-side", "show-panel")
        self.set_class(shown, f"show-{part}")
        self.set_class(not shown, f"hide-{part}")

    def say(self, text: str) -> None:
        """Says something in passing."""
        self.notify(clean(text), markup=False)

    # --- the prompt ---------------------------------------------------------------------------------------

    def _words(self) -> Mapping[str, Sequence[str]]:
        """Words that the arguments of commands may be, where the commands themselves can't know."""
        return {"theme": NAMES, "model": [card.name for card in load_cards()] if self._shelf else ()}

    def _reckon(self) -> None:
        self.controller.prompt_cost.typed(self.prompt.message, self.controller.editing)

    def save_draft(self) -> None:
        """Saves what is typed and not sent."""
        try:
            self.controller.session.save_draft(self.prompt.message)
        except KvchatError as error:
            self.say(str(error))

    @on(UserMessage.TakenBack)
    def _taken_back(self, message: UserMessage.TakenBack) -> None:
        self.prompt.give_back(message.text)
        self.prompt.focus()

    @on(Prompt.ReadAsked)
    def _read_asked(self) -> None:
        self.query_one(Transcript).focus_last()

    @on(Prompt.Scrolled)
    def _scrolled(self, message: Prompt.Scrolled) -> None:
        self.query_one(Transcript).scroll_page(message.pages)

    @on(MessageBlock.Typed)
    def _typed_elsewhere(self, message: MessageBlock.Typed) -> None:
        self.prompt.focus()
        self.prompt.insert(message.character)

    @on(TextArea.Changed)
    def _prompt_changed(self) -> None:
        if not self._begun:
            return
        for timer in (self._draft_timer, self._reckon_timer):
            if timer:
                timer.stop()
        self._draft_timer = self.set_timer(DRAFT_AFTER_S, self.save_draft)
        self._reckon_timer = self.set_timer(RECKON_AFTER_S, self._reckon)

    @on(Completions.Taken)
    def _completion_taken(self, message: Completions.Taken) -> None:
        self.prompt.take(message.completion.text)
        self.prompt.focus()
