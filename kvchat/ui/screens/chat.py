"""The chat: composes the widgets and routes what they say. Sessions conduct, turns follow, widgets show."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Static, TextArea

from kvchat.catalog import load_cards
from kvchat.contract import CacheMode, Ready
from kvchat.conversation import Hit, Preset
from kvchat.errors import KvchatError
from kvchat.session import Session
from kvchat.text import clean, one_line
from kvchat.ui.archive import Archive
from kvchat.ui.bridge import EngineBridge, EngineFactory
from kvchat.ui.commands import bindings, parse_slash, remapped
from kvchat.ui.desk import CacheDesk
from kvchat.ui.listening import tell
from kvchat.ui.messages import EngineStatus, TurnProgress
from kvchat.ui.models import ModelDesk, ModelShelf, switch_price
from kvchat.ui.preferences import Preferences
from kvchat.ui.reckoner import Reckoner
from kvchat.ui.screens.caches import CachesScreen
from kvchat.ui.screens.dialogs import AskLine, Confirm, Explanation, Help
from kvchat.ui.screens.models import ModelScreen
from kvchat.ui.screens.options import OptionsScreen, Presets
from kvchat.ui.screens.search import SearchScreen
from kvchat.ui.screens.settings import SettingsScreen
from kvchat.ui.themes import NAMES, checked_theme
from kvchat.ui.tuning import Tuning
from kvchat.ui.turns import Turns
from kvchat.ui.views import Views
from kvchat.ui.widgets.card import TourCard
from kvchat.ui.widgets.completions import Completions
from kvchat.ui.widgets.conversations import ConversationList
from kvchat.ui.widgets.keyline import KeyLine
from kvchat.ui.widgets.message import MessageBlock
from kvchat.ui.widgets.panel import CachePanel
from kvchat.ui.widgets.prompt import Prompt
from kvchat.ui.widgets.reckoning import ReckoningLine
from kvchat.ui.widgets.status import StatusLine
from kvchat.ui.widgets.strip import ReuseStrip, counts_of
from kvchat.ui.widgets.transcript import Transcript
from kvchat.ui.widgets.welcome import Welcome
from kvchat.ui.words import miss_words

SOON_S = 0.01
"""Not 0: Textual divides by a timer's seconds where the timer comes late, as on a busy machine."""
RECKON_AFTER_S = 0.3
"""The engine is asked this long after the last key what the text would cost."""
DRAFT_AFTER_S = 1.0
"""An unsent prompt is saved this long after the last key."""
PANEL_EVERY_S = 1.0
"""The figures are drawn this often at most while an answer streams."""


NONE_YET = "None yet. The first message starts one; it is kept here, with its cache."


class ChatScreen(Screen[None]):
    """Conversations on the left, the transcript and the prompt in the middle, the cache on the right."""

    BINDINGS = bindings()
    AUTO_FOCUS = "#prompt"

    def __init__(
        self,
        open_session: Callable[[], Session],
        factory: EngineFactory,
        model: str,
        preferences: Preferences,
        shelf: ModelShelf | None,
    ) -> None:
        """Without a `shelf` there is one model, and no other to choose."""
        super().__init__()
        self._open_session = open_session
        self._preferences = preferences
        self._shelf = shelf
        self._commands = remapped(preferences.keys)
        self._begun = False
        """Whether the session is open; until then there is nothing to act on."""
        self._model = model
        self.first_command = ""
        """What is done as soon as the session is open."""
        self._bridge = EngineBridge(factory, self)
        self._completions = Completions(self._words)
        self._prompt = Prompt(self._completions)
        self._draft_timer: Timer | None = None
        self._reckon_timer: Timer | None = None
        self._figures_timer: Timer | None = None
        self._figures_at = 0.0
        """When the figures were drawn last, on the monotonic clock."""

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
        self._turns = Turns(self._session, self._bridge, self.query_one(Transcript), self._model)
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
        self._begun = True
        self._prompt.set_history(self._session.history())
        self._bridge.start()
        await self._opened(typed=self._prompt.text)
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
            if self._shelf:
                self._models.close()
            self._save_draft()
            with self._telling():
                self._views.end_tour()
                self._session.abandon_turn()
        self._bridge.close()

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
                self._prompt.remember(text)
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

    @on(ConversationList.Opened)
    async def _conversation_opened(self, message: ConversationList.Opened) -> None:
        with self._telling():
            self._save_draft()
            self._session.open(message.conversation)
            await self._opened()
            self._prompt.focus()

    @on(ConversationList.Renamed)
    def _renamed(self, message: ConversationList.Renamed) -> None:
        self._rename(message.conversation, message.title)

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
        self.app.push_screen(Help(self._commands))

    def action_settings(self) -> None:
        """Shows every setting."""
        tuning = Tuning(self.app, self._session, self._desk.budget)
        self.app.push_screen(SettingsScreen(self._preferences, tuning.changed))

    def action_theme(self, name: str = "") -> None:
        """Takes other colours, or offers them."""
        with self._telling():
            if name:
                self.app.theme = checked_theme(name)
            else:
                self.app.search_themes()

    def action_model(self, name: str = "") -> None:
        """Lets another model answer, or offers the models."""
        if not self._shelf:
            self._say("No other model can be had here.")
        elif name:
            self._switch_model(name)
        else:
            state = self._turns.figures.state
            desk, context, rate = self._models, state.turn.context, state.prefill_rate
            screen = ModelScreen(desk, lambda choice: switch_price(choice, desk.loaded, context, rate))
            self.app.push_screen(screen, self._switch_model)

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

    def action_options(self) -> None:
        """Shows how this conversation answers."""
        current, session = self._session.current, self._session
        presets = Presets(session.presets, session.save_preset, session.delete_preset)
        self.app.push_screen(OptionsScreen(current.system_prompt, current.sampling, presets), self._use)

    def _use(self, chosen: Preset | None) -> None:
        if chosen is None:
            return
        with self._telling():
            self._session.configure(sampling=chosen.sampling)
            if chosen.system_prompt != self._session.current.system_prompt:
                self._desk.system_prompt(chosen.system_prompt)

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

    def action_copy(self) -> None:
        """Sends the focused message, or the last answer, to the clipboard."""
        with self._telling():
            self.query_one(Transcript).chosen.action_copy()

    def action_code(self) -> None:
        """Sends a code block of that message to the clipboard."""
        with self._telling():
            self.query_one(Transcript).chosen.action_copy_code()

    def action_thinking(self) -> None:
        """Shows or folds what the model thought."""
        transcript = self.query_one(Transcript)
        transcript.unfold_thinking(not transcript.unfolded)

    def action_search(self, words: str = "") -> None:
        """Searches in all conversations."""
        self.app.push_screen(SearchScreen(self._session.search, words), self._open_hit)

    async def _open_hit(self, chosen: tuple[Hit, list[str]] | None) -> None:
        if chosen is None:
            return
        with self._telling():
            hit, words = chosen
            self._save_draft()
            place = self._archive.place_of(hit)
            await self._opened()
            if place is not None:
                await self.query_one(Transcript).go_to(place, words)

    def action_export(self, where: str = "") -> None:
        """Writes the open conversation into a file."""
        with self._telling():
            self._archive.export(where)

    async def action_import(self, name: str = "") -> None:
        """Reads conversations from a file, or asks which one."""
        if name:
            with self._telling():
                await self._archive.import_file(name)
                self._refresh_all()
        else:
            self.app.push_screen(AskLine("File to import"), self._import)

    async def _import(self, name: str | None) -> None:
        if name:
            await self.action_import(name)

    async def action_private(self) -> None:
        """Opens an empty conversation of which nothing is written."""
        with self._telling():
            self._save_draft()
            self._session.new_private()
            await self._opened()
            self._prompt.focus()
            self._say("Nothing of this conversation is written; it is gone when kvchat ends.")

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

    def _switch_model(self, name: str | None) -> None:
        with self._telling():
            if name:
                self._model = self._turns.who = self._models.switch(name)
                self._turns.lost("starting …")
                self._say(f"{self._model} answers from now on; the engine starts with it.")
                self._refresh_all()

    def _download_went_on(self) -> None:
        for screen in self.app.screen_stack:
            if isinstance(screen, ModelScreen) and screen.is_mounted:
                screen.show()

    def _words(self) -> Mapping[str, Sequence[str]]:
        """Words that the arguments of commands may be, where the commands themselves can't know."""
        return {"theme": NAMES, "model": [card.name for card in load_cards()] if self._shelf else ()}

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
            self._prompt.set_history(self._session.history())
            if was_open:
                await self._opened()
            self._refresh_all()

    def _edit(self, number: str) -> None:
        self._prompt.show_instead(self._turns.edit(number))
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
        if self._shelf:
            self._models.opened()
        self._refresh_all()

    def _reckon(self) -> None:
        self._reckoner.typed(self._prompt.message, self._turns.editing)

    def _save_draft(self) -> None:
        with self._telling():
            self._session.save_draft(self._prompt.message)

    def _toggle(self, part: str, shown: bool | None = None) -> None:
        widget = self.query_one(f"#{part}")
        shown = not widget.display if shown is None else shown
        if shown and (self.has_class("-medium") or self.has_class("-narrow", "-short")):
            # there is room for one of them beside the words
            self.remove_class("show-side", "show-panel")
        self.set_class(shown, f"show-{part}")
        self.set_class(not shown, f"hide-{part}")

    def _refresh_figures(self) -> None:
        if self._figures_timer:
            self._figures_timer.stop()
        self._figures_timer, self._figures_at = None, time.monotonic()
        self._turns.figures.settings(self._session.current.mode, self._session.current.policy)
        state = self._turns.figures.state
        doing = "writing, Esc stops" if self._turns.answering and state.model else self._turns.status
        self.query_one(CachePanel).show(state)
        self.query_one(StatusLine).show(state, doing, self._model)
        spans, written = self._turns.reuse()
        self.query_one(ReuseStrip).show(counts_of(spans, self._session.current, written))
        for welcome in self.query(Welcome):
            welcome.ready = state.model is not None

    def _refresh_all(self) -> None:
        self._refresh_figures()
        current = self._session.current
        private = "private, nothing is written · " if self._session.is_private(current.id) else ""
        title = f"{private}{one_line(current.title) or 'new conversation'}"
        self.query_one("#title", Static).update(Content(title))
        summaries = self._session.conversations()
        self.query_one(ConversationList).show(summaries, self._turns.warm, current.id)
        self.query_one("#none-yet").display = not summaries
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
