"""What the user does to caches: asks the price, tells it, and acts. Answers come later, as reports of the
engine.

It knows the session and the bridge; it refuses to know widgets.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from kvchat.chat.session import Session
from kvchat.contract import (
    CacheCommand,
    Converted,
    CostEstimate,
    Died,
    EstimateCost,
    EvictionPolicy,
    Fork,
    KVPrecision,
    ModelFacts,
    Ready,
    Refused,
    SetBudget,
    SetPrecision,
    Status,
    TurnRequest,
    WarmCache,
)
from kvchat.text import megabytes, parse_size
from kvchat.ui.formatting import BITS, converted_words, policy_words, price_words, sentence
from kvchat.ui.turn_thread import EngineBridge

WORTH_ASKING_S = 1.0
"""An act that costs more than this is asked about before it is done."""
OPENED = "opened-"
"""How the key of a price begins that nobody asked for."""
UNPRICED = "holds from the next turn on."

Say = Callable[[str], None]
Act = Callable[[], None]
Caches = Callable[[], Mapping[str, WarmCache]]
Confirm = Callable[[str, str, Act], None]
"""Asks a question, with the word for yes, and what is done then."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An act that waits for its price."""

    what: str
    act: Act
    words: Callable[[CostEstimate], str]
    conversation: str
    """What it is meant for; another one may be open once the price is there."""


class CacheDesk:
    """Prices first, acts after."""

    def __init__(
        self, session: Session, bridge: EngineBridge, caches: Caches, say: Say, confirm: Confirm
    ) -> None:
        self._session = session
        self._bridge = bridge
        self._say = say
        self._confirm = confirm
        self._waiting: dict[str, Waiting] = {}
        self._model: ModelFacts | None = None
        """None while no engine is ready."""
        self._caches = caches
        self._budget: SetBudget | None = None
        self.converted: Converted | None = None
        """What came of the last change of precision."""
        self._opened = ""
        """Key of the price that was asked when the open conversation was opened."""

    def on_status(self, status: Status) -> None:
        """What came of an act or what it would cost, and whether there is an engine to ask."""
        match status:
            case Ready():
                self._model = status.model
                if self._budget:
                    self.command(self._budget)
                self.opened()
            case Died():
                self._on_death()
            case CostEstimate():
                self._on_quote(status)
            case Converted():
                self.converted = status
                self._say(converted_words(status))
            case Refused():
                self._say(status.reason)

    def opened(self) -> None:
        """Asks what going on with the open conversation costs; told only where something is read again."""
        request = self._next()
        if request and self._model and not self._session.pending:
            self._opened = OPENED + secrets.token_hex(4)
            self._bridge.command(EstimateCost(self._opened, request))

    def policy(self, name: str) -> None:
        """Chooses what is dropped when the context is full; says what that would be."""
        if name not in set(EvictionPolicy):
            now = self._session.current.policy
            self._say(choice("When the context is full", now, "/policy", EvictionPolicy, name))
            return
        policy = EvictionPolicy(name)
        act = partial(self._session.configure, policy=policy)
        self._priced(f"Policy {policy}", self._next(policy=policy), act, policy_words)

    def system_prompt(self, text: str) -> None:
        """Sets the system prompt of the open conversation."""
        messages = replace(self._session.current, system_prompt=text).prompt()
        act = partial(self._session.configure, system_prompt=text)
        self._priced("New system prompt", self._next(messages=messages), act)

    def edit(self, question: int, act: Act) -> None:
        """Lets a question be edited: what comes after it is on another branch then."""
        if self._model is None or self._session.pending:
            act()
            return
        current = self._session.current
        place = next(index for index, message in enumerate(current.messages) if message.id == question)
        messages = replace(current, messages=current.messages[: place + 1]).prompt()
        self._priced("Asked anew in that place", self._next(messages=messages), act)

    def precision(self, name: str) -> None:
        """Stores keys and values in another precision; what is cached is converted.

        Only rounding can be done to a cache: more bits, or a cache on disk, mean reading again.
        """
        if name not in set(KVPrecision):
            self._say(choice("Keys and values", self._session.current.kv, "/kv", KVPrecision, name))
            return
        kv = KVPrecision(name)
        if self._can_be_rounded(kv):
            self._set_precision(kv)
        else:
            self._priced(f"KV precision {kv}", self._next(kv=kv), partial(self._set_precision, kv))

    def budget(self, size: str) -> None:
        """Changes how much memory all caches may take; a new engine is told again."""
        try:
            wanted = parse_size(size)
        except (ValueError, OverflowError):
            wanted = 0
        if not wanted:
            self._say("A budget is a size, such as 2GB or 512MB.")
            return
        self._budget = SetBudget(wanted)
        self.command(self._budget)
        self._say(f"All KV caches together may take {megabytes(wanted)} of memory.")

    def fork(self, parent: str) -> None:
        """Lets the open conversation, a fork of `parent`, share its cache."""
        self.command(Fork(parent, self._session.current.id))

    def command(self, act: CacheCommand) -> None:
        """Hands an act to the engine."""
        self._bridge.command(act)

    def _priced(
        self,
        what: str,
        request: TurnRequest | None,
        act: Act,
        words: Callable[[CostEstimate], str] = price_words,
    ) -> None:
        """Does `act` once its price is known and, where it is high, agreed to.

        An engine that is not there or that is answering gives no price: then `act` is done at once.

        Args:
            what: the act, as the beginning of a sentence.
            request: the next turn, as it would be after the act; None where there is nothing to read yet.
            words: the price as the rest of that sentence.
        """
        if request is None or self._model is None or self._session.pending:
            act()
            self._say(f"{what}: {UNPRICED}")
            return
        key = secrets.token_hex(4)
        self._waiting[key] = Waiting(what, act, words, request.conversation)
        self._bridge.command(EstimateCost(key, request))

    def _on_quote(self, quote: CostEstimate) -> None:
        # whoever asked something meanwhile goes on already
        if quote.key == self._opened and quote.miss and not self._session.pending:
            self._say(f"Going on here: {price_words(quote)} {sentence(quote.miss.cause)}")
        waiting = self._waiting.pop(quote.key, None)
        if waiting is None:
            return
        words = f"{waiting.what}: {waiting.words(quote)}"
        if waiting.conversation != self._session.current.id:
            self._say(f"{waiting.what}: nothing was changed, another conversation is open.")
        elif quote.refusal:
            self._say(f"{waiting.what}: nothing was changed. {quote.refusal}")
        elif self._is_dear(quote):
            self._confirm(words, "Do it", waiting.act)
        else:
            waiting.act()
            self._say(words)

    def _is_dear(self, quote: CostEstimate) -> bool:
        """Whether something that is cached would be read again, and for how long."""
        cached = self._session.current.id in self._caches()
        dear = quote.seconds is None or quote.seconds > WORTH_ASKING_S
        return bool(quote.miss) and cached and dear

    def _on_death(self) -> None:
        """Nobody answers any more, and nothing is cached that could be lost."""
        self._model = None
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            if each.conversation == self._session.current.id:
                each.act()
                self._say(f"{each.what}: {UNPRICED}")

    def _can_be_rounded(self, kv: KVPrecision) -> bool:
        """Whether the open conversation's cache, if there is one, can be stored so as it is."""
        cache = self._caches().get(self._session.current.id)
        if cache is None or self._model is None:
            return True
        wanted = self._model.kv_dtype if kv is KVPrecision.AUTO else kv.value
        return cache.hot and BITS.get(wanted, 0) <= BITS.get(cache.kv_dtype, 0)

    def _set_precision(self, kv: KVPrecision) -> None:
        self._session.configure(kv=kv)
        self.command(SetPrecision(self._session.current.id, kv))

    def _next(self, **changes: object) -> TurnRequest | None:
        return self._session.request_as_if(**changes) if self._session.current.sent else None


def choice(what: str, now: str, command: str, names: Iterable[str], given: str) -> str:
    """What is chosen and what could be; and that `given`, if anything, is none of it."""
    wrong = f"{given} is none of them. " if given else ""
    return f"{wrong}{what}: {now}. {command} {'|'.join(names)} changes that."
