"""The chat: composes the widgets and routes what they say. Sessions conduct, turns follow, widgets show."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static, TextArea

from kvchat.contract import CacheMode
from kvchat.errors import KvchatError
from kvchat.session import Session
from kvchat.text import clean, one_line
from kvchat.ui.bridge import EngineBridge, EngineFactory
from kvchat.ui.commands import bindings, parse_slash
from kvchat.ui.desk import CacheDesk
from kvchat.ui.listening import tell
from kvchat.ui.messages import EngineStatus, TurnProgress
from kvchat.ui.screens.caches import CachesScreen
from kvchat.ui.screens.dialogs import AskLine, Confirm, Explanation, Help
from kvchat.ui.turns import Turns
from kvchat.ui.views import Views
from kvchat.ui.widgets.card import TourCard
from kvchat.ui.widgets.conversations import ConversationList
from kvchat.ui.widgets.panel import CachePanel
from kvchat.ui.widgets.prompt import Prompt
from kvchat.ui.widgets.status import StatusLine
from kvchat.ui.widgets.strip import ReuseStrip, counts_of
from kvchat.ui.widgets.transcript import Transcript
from kvchat.ui.words import miss_words

DRAFT_AFTER_S = 1.0
"""An unsent prompt is saved this long after the last key."""
PANEL_EVERY_S = 0.5
"""The panel is drawn this often while an answer streams."""


class ChatScreen(Screen[None]):
    """Conversations on the left, the transcript and the prompt in the middle, the cache on the right."""

    BINDINGS = bindings()
    AUTO_FOCUS = "#prompt"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (84, "-medium"), (112, "-wide")]

    def __init__(self, open_session: Callable[[], Session], factory: EngineFactory, model: str) -> None:
        super().__init__()
        self._open_session = open_session
        self._begun = False
        """Whether the session is open; until then there is nothing to act on."""
        self._model = model
        self.first_command = ""
        """What is done as soon as the session is open."""
        self._bridge = EngineBridge(factory, self)
        self._prompt = Prompt()
        self._draft_timer: Timer | None = None

    def compose(self) -> ComposeResult:
        yield StatusLine()
        with Horizontal(id="body"):
            with Vertical(id="side"):
                yield Static("conversations", classes="head")
                yield ConversationList(id="conversations")
            with Vertical(id="middle"):
                yield Static(id="title", classes="head")
                transcript = Transcript()
                with Horizontal(id="reading"):
                    yield ReuseStrip(transcript)
                    yield transcript
                yield self._prompt
            with Vertical(id="panel"):
                yield Static("cache", classes="head")
                with VerticalScroll(can_focus=False):
                    yield CachePanel()
        yield Footer(show_command_palette=True)

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
        self._turns = Turns(self._session, self._bridge, self.query_one(Transcript), self._model)
        self._desk = CacheDesk(
            self._session, self._bridge, lambda: self._turns.warm, self._say, self._confirm
        )
        self._views = Views(self.app, self._session, self._bridge, self._turns, self._desk)
        self._begun = True
        self._bridge.start()
        await self._opened(typed=self._prompt.text)
        self.set_interval(PANEL_EVERY_S, self._refresh_while_answering)
        if self.first_command:
            await self.run_action(self.first_command)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Commands wait until the session is open."""
        return self._begun

    @property
    def answering(self) -> bool:
        """Whether an answer is under way."""
        return self._begun and self._turns.answering is not None

    def leave(self) -> None:
        """Saves what isn't saved and ends the engine."""
        if self._begun:
            self._save_draft()
            with self._telling():
                self._session.abandon_turn()
        self._bridge.close()

    @on(EngineStatus)
    async def _engine_status(self, message: EngineStatus) -> None:
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
                self._save_draft()
                await self._turns.send(message.text)
                self._refresh_all()
        except KvchatError as error:
            self._prompt.give_back(message.text)
            self._say(str(error))

    @on(TextArea.Changed)
    def _prompt_changed(self) -> None:
        if not self._begun:
            return
        if self._draft_timer:
            self._draft_timer.stop()
        self._draft_timer = self.set_timer(DRAFT_AFTER_S, self._save_draft)

    @on(ConversationList.Opened)
    async def _conversation_opened(self, message: ConversationList.Opened) -> None:
        with self._telling():
            self._save_draft()
            self._session.open(message.conversation)
            await self._opened()
            self._prompt.focus()

    @on(ConversationList.RenameAsked)
    def _rename_asked(self, message: ConversationList.RenameAsked) -> None:
        self._ask_title(message.conversation)

    @on(ConversationList.DeleteAsked)
    def _delete_asked(self, message: ConversationList.DeleteAsked) -> None:
        self._ask_delete(message.conversation)

    async def action_new(self) -> None:
        """Opens an empty conversation."""
        with self._telling():
            self._save_draft()
            self._session.new()
            await self._opened()
            self._prompt.focus()

    def action_help(self) -> None:
        """Shows the keys."""
        self.app.push_screen(Help())

    def action_panel(self) -> None:
        """Shows or hides the panel, whatever the width would have it be."""
        self._toggle("panel")

    def action_conversations(self) -> None:
        """Goes to the list; from the list, back to the prompt."""
        conversations = self.query_one(ConversationList)
        if conversations.has_focus:
            self._toggle("side", False)
            self._prompt.focus()
        else:
            self._toggle("side", True)
            conversations.focus()

    def action_cache(self, mode: str = "") -> None:
        """Sets the cache mode, or takes the next one."""
        modes = list(CacheMode)
        following = modes[(modes.index(self._session.current.mode) + 1) % len(modes)]
        if mode and mode not in set(CacheMode):
            self._say(f"The cache modes are on, turn and off; not {mode}.")
            return
        with self._telling():
            self._session.configure(mode=CacheMode(mode) if mode else following)
        self._refresh_all()

    def action_stop(self) -> None:
        """Stops the answer; without one, goes to the prompt."""
        if self._turns.stop():
            return
        if self._turns.editing is not None:
            self._turns.editing = None
            self._prompt.recall(0)
        self._prompt.focus()

    async def action_regenerate(self) -> None:
        """Asks for the last answer again."""
        with self._telling():
            await self._turns.regenerate()
        self._refresh_all()

    def action_system(self, text: str = "") -> None:
        """Sets the system prompt, or asks for it."""
        if text:
            self._set_system(text)
        else:
            question = "System prompt of this conversation (empty: the model's own)"
            self.app.push_screen(AskLine(question, self._session.current.system_prompt), self._set_system)

    def action_rename(self, title: str = "") -> None:
        """Renames the open conversation, or asks for the title."""
        if not self._session.current.messages:
            self._say("This conversation has no messages yet; its first one gives it a title.")
        elif title:
            self._rename(self._session.current.id, title)
        else:
            self._ask_title(self._session.current.id)

    async def action_undo(self) -> None:
        """Takes the last question back into the prompt."""
        with self._telling():
            self._prompt.give_back(await self._turns.undo())
            self._refresh_all()

    def action_edit(self, number: str = "") -> None:
        """Takes a question into the prompt; what is sent then replaces it."""
        with self._telling():
            self._desk.edit(self._turns.question_id(number), lambda: self._edit(number))

    async def action_continue(self) -> None:
        """Lets the model go on with the last answer."""
        with self._telling():
            await self._turns.go_on()
        self._refresh_all()

    async def action_fork(self, number: str = "") -> None:
        """Goes on in a new conversation that shares the cache so far."""
        with self._telling():
            parent = self._session.current.id
            self._save_draft()
            self._session.fork(self._turns.answer_to(number) if number else None)
            self._desk.fork(parent)
            await self._opened()
            self._say("This is the fork; the other conversation stays as it is, and they share one cache.")

    def action_why(self) -> None:
        """Explains the last miss."""
        figures = self._turns.figures
        why = miss_words(figures.last_miss, figures.state.turn.reuse_note)
        self.app.push_screen(Explanation("Why was something read again?", why))

    def action_map(self) -> None:
        """Shows the cache token by token."""
        self._views.map()

    async def action_tour(self) -> None:
        """Begins the tour, in a conversation that is not saved."""
        with self._telling():
            if self.query(TourCard):
                return
            self._save_draft()
            guide = self._views.tour()
            await self._opened()
            await self.query_one("#middle").mount(TourCard(guide, self._refresh_all), before=self._prompt)

    @on(TourCard.Ended)
    async def _tour_ended(self) -> None:
        await self.query(TourCard).remove()
        with self._telling():
            self._views.end_tour()
            await self._opened()
            self._prompt.focus()

    async def action_compare(self, text: str = "") -> None:
        """Answers with and without the cache, side by side; takes what stands in the prompt."""
        typed = "" if text else self._prompt.text
        self._prompt.text = self._prompt.text.removeprefix(typed)
        self._save_draft()
        try:
            await self._views.race(text or typed.strip())
        except KvchatError as error:
            self._prompt.give_back(typed)
            self._say(str(error))
        self._refresh_all()

    def action_caches(self) -> None:
        """Shows every cache."""
        with self._telling():
            self._views.caches(self.action_budget)

    def action_timeline(self) -> None:
        """Shows what happened to the cache of this conversation."""
        with self._telling():
            self._views.timeline()

    def action_policy(self, name: str = "") -> None:
        """Chooses what is dropped when the context is full."""
        with self._telling():
            self._desk.policy(name)
            self._refresh_figures()

    def action_kv(self, name: str = "") -> None:
        """Stores keys and values in another precision."""
        with self._telling():
            self._desk.precision(name)

    def action_budget(self, size: str = "") -> None:
        """Changes how much memory all caches may take."""
        if size:
            self._desk.budget(size)
        else:
            question = "Memory for all KV caches, such as 2GB or 512MB"
            self.app.push_screen(AskLine(question), lambda given: self._desk.budget(given) if given else None)

    async def action_clear(self) -> None:
        """Empties the open conversation."""
        with self._telling():
            self._stop_in(self._session.current.id)
            self._session.clear()
            self._turns.forget(self._session.current.id)
            await self._opened()

    def action_delete(self) -> None:
        """Asks, then deletes the open conversation."""
        if self._session.current.messages:
            self._ask_delete(self._session.current.id)

    def action_leave(self) -> None:
        """Leaves kvchat."""
        self.app.exit()

    def _ask_title(self, conversation: str) -> None:
        title = next((s.title for s in self._session.conversations() if s.id == conversation), "")
        self.app.push_screen(AskLine("Title", title), lambda new: self._rename(conversation, new or ""))

    def _rename(self, conversation: str, title: str) -> None:
        with self._telling():
            self._session.rename(conversation, title)
            self._refresh_all()

    def _ask_delete(self, conversation: str) -> None:
        title = next((s.title for s in self._session.conversations() if s.id == conversation), "")

        async def delete(sure: bool | None) -> None:
            if sure:
                await self._delete(conversation)

        self.app.push_screen(Confirm(f"Delete “{one_line(title)}” for good?", "Delete"), delete)

    async def _delete(self, conversation: str) -> None:
        with self._telling():
            was_open = conversation == self._session.current.id
            self._stop_in(conversation)
            self._session.delete(conversation)
            self._turns.forget(conversation)
            if was_open:
                await self._opened()
            self._refresh_all()

    def _edit(self, number: str) -> None:
        self._prompt.recall(self._turns.edit(number))
        self._prompt.focus()
        self._say("Enter asks it in the old one's place, which stays as another branch; Esc leaves it.")

    def _stop_in(self, conversation: str) -> None:
        """Stops the answer under way if it belongs to that conversation."""
        answering = self._turns.answering
        if answering and answering.conversation == conversation:
            self._turns.stop()

    def _set_system(self, text: str | None) -> None:
        with self._telling():
            if text is not None:
                self._desk.system_prompt(text)

    async def _opened(self, typed: str = "") -> None:
        self._prompt.text = self._session.draft() + typed
        self._prompt.move_cursor(self._prompt.document.end)
        await self._turns.show_conversation()
        self._desk.opened()
        self._refresh_all()

    def _save_draft(self) -> None:
        with self._telling():
            self._session.save_draft(self._prompt.text)

    def _toggle(self, part: str, shown: bool | None = None) -> None:
        widget = self.query_one(f"#{part}")
        shown = not widget.display if shown is None else shown
        self.set_class(shown, f"show-{part}")
        self.set_class(not shown, f"hide-{part}")

    def _refresh_while_answering(self) -> None:
        if self._turns.answering:
            self._refresh_figures()

    def _refresh_figures(self) -> None:
        self._turns.figures.settings(self._session.current.mode, self._session.current.policy)
        state = self._turns.figures.state
        doing = "writing, Esc stops" if self._turns.answering and state.model else self._turns.status
        self.query_one(CachePanel).show(state)
        self.query_one(StatusLine).show(state, doing, self._model)
        spans, written = self._turns.reuse()
        self.query_one(ReuseStrip).show(counts_of(spans, self._session.current, written))

    def _refresh_all(self) -> None:
        self._refresh_figures()
        current = self._session.current
        self.query_one("#title", Static).update(Content(one_line(current.title) or "new conversation"))
        summaries = self._session.conversations()
        self.query_one(ConversationList).show(summaries, self._turns.warm, current.id)
        self._prompt.set_history([m.text for m in current.messages if m.role == "user"])
        for screen in self.app.screen_stack:
            if isinstance(screen, CachesScreen):
                screen.show(self._turns.pool)

    def _confirm(self, question: str, yes: str, act: Callable[[], None]) -> None:
        def answered(sure: bool | None) -> None:
            if sure:
                with self._telling():
                    act()
                    self._refresh_all()

        self.app.push_screen(Confirm(question, yes), answered)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside the block, what goes wrong for a reason is told and ends nothing."""
        try:
            yield
        except KvchatError as error:
            self._say(str(error))

    def _say(self, text: str) -> None:
        self.notify(clean(text), markup=False)
