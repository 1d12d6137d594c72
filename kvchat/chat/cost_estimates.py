"""What a change would cost: the engine is asked first, and a change that costs much is confirmed by the user.

Answers come later, as events of the engine.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvchat.chat.wording import price_words, sentence
from kvchat.contract import CostEstimate, EstimateCost, TurnRequest

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController

WORTH_ASKING_S = 1.0
"""A change that costs more than this is asked about before it is made."""
OPENED = "opened-"
"""How the key of an estimate begins that is made when a conversation is opened."""
UNPRICED = "holds from the next turn on."

Words = Callable[[CostEstimate], str]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A change that waits for its estimate."""

    what: str
    act: Callable[[], None]
    words: Words
    conversation: str
    """What it is meant for; another one may be open once the estimate is there."""


class CostEstimates:
    """Asks the engine for estimates, and makes the changes that waited for them."""

    def __init__(self, controller: "ChatController") -> None:
        self._controller = controller
        self._waiting: dict[str, Waiting] = {}
        self._opened = ""
        """Key of the estimate that was asked for when the open conversation was opened."""

    def opened(self) -> None:
        """Asks what going on with the open conversation costs; said only where something is read again."""
        request = self.next_turn()
        if request and self._can_estimate():
            self._opened = OPENED + secrets.token_hex(4)
            self._controller.engine.command(EstimateCost(self._opened, request))

    def change(
        self, what: str, request: TurnRequest | None, act: Callable[[], None], words: Words = price_words
    ) -> None:
        """Does `act` once its cost is known and, where it is high, agreed to.

        An engine that is not there or that is answering gives no estimate: then `act` is done at once.

        Args:
            what: the change, as the beginning of a sentence.
            request: the next turn, as it would be after it; None where there is nothing to read yet.
            act: makes the change.
            words: the estimate as the rest of that sentence.
        """
        if request is None or not self._can_estimate():
            act()
            self._controller.port.say(f"{what}: {UNPRICED}")
        else:
            key = secrets.token_hex(4)
            self._waiting[key] = Waiting(what, act, words, request.conversation)
            self._controller.engine.command(EstimateCost(key, request))

    def edit(self, request: TurnRequest, act: Callable[[], None]) -> None:
        """As `change`, for a question that is asked anew; without an estimate, nothing is said."""
        if self._can_estimate():
            self.change("Asked anew in that place", request, act)
        else:
            act()

    def next_turn(self, **changes: object) -> TurnRequest | None:
        """The next turn of the open conversation, with these changes; None where nothing was sent."""
        session = self._controller.session
        return session.request_as_if(**changes) if session.current.sent else None

    def on_estimate(self, estimate: CostEstimate) -> None:
        """An estimate came."""
        controller, say = self._controller, self._controller.port.say
        # where a question was asked meanwhile, the user goes on already
        if estimate.key == self._opened and estimate.miss and not controller.session.pending:
            say(f"Going on here: {price_words(estimate)} {sentence(estimate.miss.cause)}")
        waiting = self._waiting.pop(estimate.key, None)
        if waiting is None:
            return
        words = f"{waiting.what}: {waiting.words(estimate)}"
        if waiting.conversation != controller.session.current.id:
            say(f"{waiting.what}: nothing was changed, another conversation is open.")
        elif estimate.refusal:
            say(f"{waiting.what}: nothing was changed. {estimate.refusal}")
        elif self._is_dear(estimate):
            controller.port.confirm(words, "Do it", waiting.act)
        else:
            waiting.act()
            say(words)

    def on_death(self) -> None:
        """No estimate comes any more, and nothing is cached that could be lost: what waited is done."""
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            if each.conversation == self._controller.session.current.id:
                each.act()
                self._controller.port.say(f"{each.what}: {UNPRICED}")

    def _can_estimate(self) -> bool:
        return self._controller.state.ready and not self._controller.session.pending

    def _is_dear(self, estimate: CostEstimate) -> bool:
        """Whether something that is cached would be read again, and for how long."""
        state = self._controller.state
        dear = estimate.seconds is None or estimate.seconds > WORTH_ASKING_S
        return bool(estimate.miss) and state.conversation in state.caches and dear
