"""What the user does to caches: asks the price, tells it, and acts. Answers come later, as reports of the
engine.

It knows the session and the bridge; it refuses to know widgets.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvchat.contract import (
    Ask,
    CacheAct,
    Converted,
    EvictionPolicy,
    Fork,
    KVPrecision,
    Miss,
    Quote,
    Refused,
    Report,
    SetBudget,
    SetPrecision,
    TurnRequest,
)
from kvchat.session import Session
from kvchat.text import megabytes, one_line, parse_size
from kvchat.ui.bridge import EngineBridge

WORTH_ASKING_S = 1.0
"""An act that costs more than this is asked about before it is done."""

Say = Callable[[str], None]
Act = Callable[[], None]
Confirm = Callable[[str, str, Act], None]
"""Asks a question, with the word for yes, and what is done then."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An act that waits for its price."""

    what: str
    act: Act


class CacheDesk:
    """Prices first, acts after."""

    def __init__(self, session: Session, bridge: EngineBridge, say: Say, confirm: Confirm) -> None:
        self._session = session
        self._bridge = bridge
        self._say = say
        self._confirm = confirm
        self._waiting: dict[str, Waiting] = {}
        self.engine_ready = False

    def on_report(self, report: Report) -> None:
        """What came of an act, or what it would cost."""
        match report:
            case Quote():
                self._on_quote(report)
            case Converted():
                self._say(converted_words(report))
            case Refused():
                self._say(report.reason)

    def priced(self, what: str, request: TurnRequest | None, act: Act) -> None:
        """Does `act` once its price is known and, where it is high, agreed to.

        Args:
            what: the act, as the beginning of a sentence.
            request: the next turn, as it would be after the act; None where there is nothing to read yet.
        """
        if request is None or not self.engine_ready:
            act()
            return
        key = secrets.token_hex(4)
        self._waiting[key] = Waiting(what, act)
        self._bridge.act(Ask(key, request))

    def policy(self, name: str) -> None:
        """Chooses what is dropped when the context is full; says what that would be."""
        if name not in set(EvictionPolicy):
            self._say(f"The policies are {', '.join(EvictionPolicy)}; not {name}.")
            return
        policy = EvictionPolicy(name)
        self.priced(
            f"Policy {name}",
            self._next(policy=policy),
            lambda: self._session.configure(policy=policy),
        )

    def system_prompt(self, text: str) -> None:
        """Sets the system prompt of the open conversation."""
        messages = replace(self._session.current, system_prompt=text).prompt()
        self.priced(
            "System prompt",
            self._next(messages=messages),
            lambda: self._session.configure(system_prompt=text),
        )

    def precision(self, name: str) -> None:
        """Stores keys and values in another precision; what is cached is converted."""
        if name not in set(KVPrecision):
            self._say(f"The KV precisions are {', '.join(KVPrecision)}; not {name}.")
            return
        kv = KVPrecision(name)
        self._session.configure(kv=kv)
        self.act(SetPrecision(self._session.current.id, kv))

    def budget(self, size: str) -> None:
        """Changes how much memory all caches may take."""
        try:
            wanted = parse_size(size)
        except (ValueError, OverflowError):
            self._say("A budget is a size, such as 2GB or 512MB.")
            return
        self.act(SetBudget(wanted))
        self._say(f"All KV caches together may take {megabytes(wanted)} of memory.")

    def fork(self, parent: str) -> None:
        """Lets the open conversation, a fork of `parent`, share its cache."""
        self.act(Fork(parent, self._session.current.id))

    def act(self, act: CacheAct) -> None:
        """Hands an act to the engine."""
        self._bridge.act(act)

    def _next(self, **changes: object) -> TurnRequest | None:
        return self._session.request_as_if(**changes) if self._session.current.messages else None

    def _on_quote(self, quote: Quote) -> None:
        waiting = self._waiting.pop(quote.key, None)
        if waiting is None:
            return
        words = f"{waiting.what}: {price_words(quote)}"
        if quote.miss and (quote.seconds is None or quote.seconds > WORTH_ASKING_S):
            self._confirm(words, "Do it", waiting.act)
        else:
            waiting.act()
            self._say(words)


def price_words(quote: Quote) -> str:
    """What the next turn would read, and what the policy would drop."""
    if quote.refusal:
        return quote.refusal
    words = f"the next turn reads {quote.prefilled_tokens:,} tokens{about(quote.seconds)}"
    if quote.miss:
        words += f", {quote.miss.tokens:,} of them again"
    return f"{words}. When the context is full, it would now drop {quote.preview}."


def about(seconds: float | None) -> str:
    """`, about 0.7 s`; nothing where nothing was measured yet."""
    return "" if seconds is None else f", about {seconds:.1f} s"


def converted_words(converted: Converted) -> str:
    """Bytes before and after, and how far the model still agrees with itself."""
    words = f"Keys and values are {converted.kv_dtype}"
    if converted.bytes_after != converted.bytes_before:
        words += f": {megabytes(converted.bytes_before)} → {megabytes(converted.bytes_after)}"
    if converted.compared_tokens:
        words += (
            f"; of the last {converted.compared_tokens} tokens, the model would choose "
            f"{converted.agreeing_tokens} as before"
        )
    return f"{words}. {converted.note}".strip() if converted.note else f"{words}."


def miss_words(miss: Miss | None) -> str:
    """The last miss, for people: the cause, the price, and the first token that differs in its place."""
    if miss is None:
        return "Nothing was read again: the last turn reused everything there was."
    lines = [f"**{one_line(miss.cause)}**", f"{miss.tokens:,} tokens were read again{about(miss.seconds)}."]
    if miss.token is not None:
        place = "the system prompt" if miss.message == 0 else f"message {miss.message}"
        lines.append(f"The first difference is token {miss.token:,}, in {place}:")
        lines.append(f"cached: `{code(miss.was)}`  \nnow: `{code(miss.now)}`")
    return "\n\n".join(lines)


def code(text: str) -> str:
    """Text as it may stand in a Markdown code span."""
    return one_line(text.replace("\n", "⏎").replace("`", "ʼ")) or "(nothing)"
