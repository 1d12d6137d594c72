"""The chat screen as the controller uses it."""

from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING

from kvchat.chat.port import Act, Asking, Port
from kvchat.chat.prompt_cost import Reckoning
from kvchat.errors import KvchatError
from kvchat.text import clean
from kvchat.ui.views import VIEWS
from kvchat.ui.widgets.prompt_cost import ReckoningLine

if TYPE_CHECKING:
    from kvchat.ui.screens.chat import ChatScreen

EDITING = "Enter asks it in the old one's place, which stays as another branch; Esc leaves it."


class ScreenPort(Port):
    """Notifications, dialogs, the transcript and the prompt."""

    def __init__(self, screen: "ChatScreen") -> None:
        self._screen = screen
        self.typed = ""
        """What was typed before the session was open."""

    def say(self, text: str) -> None:
        """Shows a notification."""
        self._screen.notify(clean(text), markup=False)

    def not_saved(self, error: KvchatError) -> None:
        """Says why."""
        self.say(str(error))

    def show_cost(self, cost: Reckoning) -> None:
        """Shows it under the prompt."""
        self._screen.query_one(ReckoningLine).show(cost)

    def confirm(self, question: str, yes: str, act: Act) -> None:
        """Opens a dialog."""
        from kvchat.ui.screens.dialogs import Confirm

        async def answered(sure: bool | None) -> None:
            if sure:
                await self._do(act)

        self._screen.app.push_screen(Confirm(question, yes), answered)

    def ask_line(self, question: str, value: str, act: Callable[[str], object], otherwise: str) -> None:
        """Opens a dialog; does nothing where the user turns away."""
        from kvchat.ui.screens.dialogs import AskLine

        async def answered(text: str | None) -> None:
            if text is not None:
                await self._do(partial(act, text))

        self._screen.app.push_screen(AskLine(question, value), answered)

    async def open_conversation(self, words: str = "") -> None:
        """Shows the open conversation, and its draft in the prompt."""
        typed, self.typed = self.typed, ""
        prompt = self._screen.prompt
        prompt.text = self._screen.controller.session.draft() + typed
        prompt.move_cursor(prompt.document.end)
        await self.show_conversation()

    async def show_conversation(self, words: str = "") -> None:
        """Shows the open conversation."""
        await self._screen.presenter.show_conversation()
        self._screen.refresh_all()

    def messages_deleted(self) -> None:
        """Up brings back what is still there."""
        self._screen.prompt.set_history(self._screen.controller.session.history())

    def focus_prompt(self) -> None:
        """Gives it the focus."""
        self._screen.prompt.focus()

    async def begin_answer(self, asking: Asking) -> None:
        """Shows the question, and the beginning of its answer."""
        if asking is Asking.AGAIN:
            self._screen.prompt.drop(self._screen.controller.session.current.messages[-1].text)
        await self._screen.presenter.begin_answer(asking)

    def give_back(self, text: str) -> None:
        """Puts a question into the prompt, before what is typed there."""
        self._screen.prompt.give_back(text)

    def edit(self, text: str) -> None:
        """Shows a question in the prompt, instead of the draft."""
        self._screen.prompt.show_instead(text)
        self._screen.prompt.focus()
        self.say(EDITING)

    def save_draft(self) -> None:
        """Saves the prompt."""
        self._screen.save_draft()

    async def engine_replaced(self) -> None:
        """Says which model answers."""
        title = self._screen.controller.state.model_title
        self.say(f"{title} answers from now on; the engine starts with it.")
        self._screen.refresh_all()

    def open_view(self, name: str, argument: str) -> Awaitable[None] | None:
        """The screen has a view for everything."""
        return VIEWS[name](self._screen, argument)

    async def _do(self, act: Callable[[], object]) -> None:
        try:
            done = act()
            if isawaitable(done):
                await done
        except KvchatError as error:
            self.say(str(error))
        self._screen.refresh_all()
