"""What is done with whole conversations: open, name, fork, find, export, import, delete, set up."""

from textual import on

from kvchat.chat.conversation import Hit, Preset
from kvchat.text import one_line
from kvchat.ui.actions.base import ActionBase
from kvchat.ui.widgets.conversations import ConversationList
from kvchat.ui.widgets.transcript import Transcript


class ConversationActions(ActionBase):
    """Acts on conversations."""

    async def action_new(self) -> None:
        """Opens an empty conversation."""
        with self._telling():
            self._save_draft()
            self._session.new()
            await self._opened()
            self._prompt.focus()

    async def action_private(self) -> None:
        """Opens an empty conversation of which nothing is written."""
        with self._telling():
            self._save_draft()
            self._session.new_private()
            await self._opened()
            self._prompt.focus()
            self._say("Nothing of this conversation is written; it is gone when kvchat ends.")

    def action_conversations(self) -> None:
        """Goes to the list; from the list, back to the prompt."""
        conversations = self.query_one(ConversationList)
        if conversations.has_focus:
            self._toggle("side", False)
            self._prompt.focus()
        else:
            self._toggle("side", True)
            conversations.focus()

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

    def action_rename(self, title: str = "") -> None:
        """Renames the open conversation, or asks for the title."""
        if not self._session.current.messages:
            self._say("This conversation has no messages yet; its first one gives it a title.")
        elif title:
            self._rename(self._session.current.id, title)
        else:
            self._ask_title(self._session.current.id)

    async def action_fork(self, number: str = "") -> None:
        """Goes on in a new conversation that shares the cache so far."""
        with self._telling():
            parent = self._session.current.id
            self._save_draft()
            self._session.fork(self._turns.answer_to(number) if number else None)
            self._desk.fork(parent)
            await self._opened()
            self._say("This is the fork; the other conversation stays as it is, and they share one cache.")

    def action_search(self, words: str = "") -> None:
        """Searches in all conversations."""
        from kvchat.ui.screens.search import SearchScreen

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
        from kvchat.ui.screens.dialogs import AskLine

        if name:
            with self._telling():
                await self._archive.import_file(name)
                self._refresh_all()
        else:
            self.app.push_screen(AskLine("File to import"), self._import)

    async def _import(self, name: str | None) -> None:
        if name:
            await self.action_import(name)

    def action_system(self, text: str = "") -> None:
        """Sets the system prompt, or asks for it."""
        from kvchat.ui.screens.dialogs import AskLine

        if text:
            self._set_system(text)
        else:
            question = "System prompt of this conversation (empty: the model's own)"
            self.app.push_screen(AskLine(question, self._session.current.system_prompt), self._set_system)

    def _set_system(self, text: str | None) -> None:
        with self._telling():
            if text is not None:
                self._desk.system_prompt(text)

    def action_options(self) -> None:
        """Shows how this conversation answers."""
        from kvchat.ui.screens.options import OptionsScreen, Presets

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

    def _ask_title(self, conversation: str) -> None:
        from kvchat.ui.screens.dialogs import AskLine

        title = next((s.title for s in self._session.conversations() if s.id == conversation), "")
        self.app.push_screen(AskLine("Title", title), lambda new: self._rename(conversation, new or ""))

    def _rename(self, conversation: str, title: str) -> None:
        with self._telling():
            self._session.rename(conversation, title)
            self._refresh_all()

    def _ask_delete(self, conversation: str) -> None:
        from kvchat.ui.screens.dialogs import Confirm

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
