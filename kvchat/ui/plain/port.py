"""A terminal of lines as the controller uses it: what it says is written, what it asks is a line."""

from collections.abc import Awaitable
from inspect import iscoroutine
from typing import TYPE_CHECKING

from kvchat.chat.port import Act, Asking, NoViewError, Port, complete
from kvchat.chat.prompt_cost import Reckoning
from kvchat.errors import KvchatError
from kvchat.text import one_line
from kvchat.ui.plain.commands import VIEWS, short

if TYPE_CHECKING:
    from kvchat.ui.plain.loop import PlainChat


class PlainPort(Port):
    """Lines; none of its methods waits for the loop of asyncio."""

    def __init__(self, chat: "PlainChat") -> None:
        self._chat = chat
        self.cost = Reckoning()
        """What is known of the line that is about to be sent."""

    def say(self, text: str) -> None:
        """Writes a line."""
        self._chat.write_line(text)

    def tell(self, text: str) -> None:
        """Writes a line."""
        self.say(text)

    def not_saved(self, error: KvchatError) -> None:
        """Writes a line below the answer."""
        self.say(f"\n{error}")

    def show_cost(self, cost: Reckoning) -> None:
        """Keeps it; the files that are attached are told when they are sent."""
        self.cost = cost

    def confirm(self, question: str, yes: str, act: Act) -> None:
        """Asks, and acts where the answer is yes."""
        if self._chat.ask(f"{question} Type yes to do it: ").lower() not in ("y", "yes"):
            self.say("Nothing was changed.")
        elif iscoroutine(done := act()):
            complete(done)

    async def open_conversation(self, words: str = "") -> None:
        """Tells it."""
        if words:
            self.say(words)

    async def show_conversation(self, words: str = "") -> None:
        """Tells it."""
        await self.open_conversation(words)

    async def begin_answer(self, asking: Asking) -> None:
        """Writes who answers."""
        self._chat.write(f"{one_line(self._chat.controller.state.model_title)}: ")

    def give_back(self, text: str) -> None:
        """Tells it."""
        self.say(f"Taken back: {short(text)}")

    def edit(self, text: str) -> None:
        """Tells it."""
        self.say(f"It was: {short(text)}. The next line is asked in its place.")

    async def engine_replaced(self) -> None:
        """Waits until the other model can answer."""
        if self._chat.until_ready():
            self.say(f"{one_line(self._chat.controller.state.model_title)} answers from now on.")

    def open_view(self, name: str, argument: str) -> Awaitable[None] | None:
        """Writes it, where it is text."""
        if name == "leave":
            self._chat.leave()
            return None
        if name == "tour":
            return self._chat.tour()
        if name not in VIEWS:
            raise NoViewError
        done = VIEWS[name](self._chat.controller, argument)
        return done if iscoroutine(done) else None
