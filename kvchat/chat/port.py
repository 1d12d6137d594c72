"""What the controller needs of a front end and of an engine: two protocols."""

from collections.abc import Awaitable, Callable, Coroutine
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from kvchat.contract import CacheCommand, Status, TurnEvent, TurnRequest
from kvchat.errors import KvchatError

if TYPE_CHECKING:
    from kvchat.chat.prompt_cost import Reckoning

EngineEvent = TurnEvent | Status
OnEvent = Callable[[EngineEvent], None]
"""Takes an event of the engine; called from any thread."""
Act = Callable[[], Awaitable[None] | None]
"""What is done once the user agreed."""


class EngineClient(Protocol):
    """An engine that takes requests and reports by events; no method waits for an answer."""

    def start(self) -> None:
        """Loads; `Loading`, `Ready` or `Died` are reported."""
        ...

    def submit(self, request: TurnRequest) -> None:
        """Asks for a turn; its last event is a `TurnFinished` or a `TurnFailed`."""
        ...

    def stop(self, turn: str) -> None:
        """Ends a turn soon."""
        ...

    def command(self, act: CacheCommand) -> None:
        """Does something to the caches; what came of it is reported."""
        ...

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache in memory and on disk."""
        ...

    def close(self) -> None:
        """Saves what is not saved, and frees everything."""
        ...


EngineFactory = Callable[[OnEvent], EngineClient]


class Asking(StrEnum):
    """How a question comes to be answered."""

    NEW = "new"
    EDITED = "edited"
    """In the place of an earlier one: what came after that one is on another branch."""
    AGAIN = "again"
    CONTINUED = "continued"


class NoViewError(Exception):
    """This front end has no view for a command."""


class Port:
    """A front end, as far as the controller uses it; this one shows nothing, has no views and never asks."""

    def say(self, text: str) -> None:
        """Tells the user something in passing; the text may come from anywhere."""

    def tell(self, text: str) -> None:
        """Tells what a front end that draws the state shows anyway."""

    def confirm(self, question: str, yes: str, act: Act) -> None:
        """Asks, with the word for yes, and acts where the answer is yes."""

    def ask_line(self, question: str, value: str, act: Callable[[str], object], otherwise: str) -> None:
        """Asks for a line of text and acts with it; says `otherwise` where nobody can be asked.

        `act` may return an awaitable. `value` is the text to start with.
        """
        self.say(otherwise)

    def not_saved(self, error: KvchatError) -> None:
        """Something of a turn could not be saved; it can still be shown."""

    def show_cost(self, cost: "Reckoning") -> None:
        """Shows what sending the text in the prompt would cost."""

    async def open_conversation(self, words: str = "") -> None:
        """Shows the open conversation, which is another one now, and its unsent text.

        `words` say that, for a front end that draws nothing.
        """

    async def show_conversation(self, words: str = "") -> None:
        """Shows the open conversation, which has other messages now."""

    def messages_deleted(self) -> None:
        """What was sent before may be gone from the file."""

    def focus_prompt(self) -> None:
        """The user is about to write."""

    async def begin_answer(self, asking: Asking) -> None:
        """Shows the question that is about to be answered, and the beginning of its answer."""

    def give_back(self, text: str) -> None:
        """Takes a question that was taken back, to be sent again."""

    def edit(self, text: str) -> None:
        """Takes an earlier question; what is sent next replaces it."""

    def save_draft(self) -> None:
        """Saves what is typed and not sent: another conversation is opened next."""

    async def engine_replaced(self) -> None:
        """Another model's engine starts."""

    def open_view(self, name: str, argument: str) -> Awaitable[None] | None:
        """Opens the view of a command.

        Raises:
            NoViewError: this front end has none.
        """
        raise NoViewError


def complete(coroutine: Coroutine[Any, Any, object]) -> None:
    """Runs a coroutine that never waits, inside or outside of a loop of asyncio.

    Raises:
        RuntimeError: it waits.
    """
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("a coroutine that must not wait does")
