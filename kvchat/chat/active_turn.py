"""A turn that is being answered: what is known of it so far.

Plain values. Must not depend on the store or on an engine.
"""

from dataclasses import dataclass, field, replace

from kvchat.chat.conversation import Conversation, Message
from kvchat.chat.reasoning import split_thinking
from kvchat.chat.token_status import ANSWER, TokenStatuses, token_statuses
from kvchat.contract import TokenSpan, TokenStatus


@dataclass(frozen=True, slots=True)
class NotSent:
    """A question whose turn ended before the first token of an answer."""

    conversation: str
    text: str
    edited: int | None = None
    """Id of the question that it was asked in the place of."""


@dataclass(slots=True)
class ActiveTurn:
    """The turn that is being answered; it outlives a switch to another conversation."""

    turn: str
    conversation: str
    asked: int
    """Id of the message that is being answered."""
    places: tuple[tuple[int, ...], ...] = ()
    """Ids of the messages at each place of the request."""
    spans: tuple[TokenSpan, ...] = ()
    """What the turn does with every message; none before the engine told it."""
    reply: Message | None = None
    """The answer as it was saved last."""
    text: str = ""
    """Of the whole answer so far."""
    ids: list[int] = field(default_factory=list)
    """Of what this turn wrote."""
    saved_at: float = 0.0
    tokenizer: str = ""
    begun: Message | None = None
    """The answer that this turn goes on with, as it was before."""
    before: Conversation | None = None
    """What was shown before, where this turn puts something in the place of it: a turn without an answer
    brings it back."""
    edited: int | None = None
    """Id of the question that this turn asks anew."""
    evicted_messages: int = 0
    """The oldest messages that this turn's request leaves out."""

    @property
    def is_answered(self) -> bool:
        """Whether it brought a token of an answer."""
        return bool(self.ids) or self.text != self.begun_text

    @property
    def begun_text(self) -> str:
        """What the answer said before this turn."""
        return self.begun.raw if self.begun else ""

    def statuses(self) -> TokenStatuses:
        """What the turn has done with every message so far."""
        answer = self.reply.id if self.reply else ANSWER
        found = token_statuses(self.spans, self.places, answer)
        if self.spans and self.ids:
            found[answer] = {**found.get(answer, {}), TokenStatus.WRITTEN: len(self.ids)}
        return found

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Of the whole answer; none where a part of it has none of this tokenizer.

        Such an answer is encoded again: ids that stand for half of a text would lose the other half.
        """
        if self.begun is None:
            return tuple(self.ids)
        fits = self.begun.token_ids and self.begun.tokenizer == self.tokenizer
        return (*self.begun.token_ids, *self.ids) if fits else ()

    def answer(self, finish: str | None) -> Message:
        """The answer as far as it goes, in the place of the one that was saved last."""
        thinking, text = split_thinking(self.text)
        return replace(
            self.reply or Message(0, self.asked, "assistant", "", ""),
            text=text,
            thinking=thinking,
            token_ids=self.all_ids,
            tokenizer=self.tokenizer,
            finish_reason=finish,
        )
