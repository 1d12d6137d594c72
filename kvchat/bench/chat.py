"""A conversation with an engine, for measurements and checks. Must not measure anything itself."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvchat.contract import (
    CacheMode,
    Engine,
    EvictionPolicy,
    PromptMessage,
    Sampling,
    TurnEvent,
    TurnFinished,
    TurnRequest,
)
from kvchat.errors import KvchatError


def run_turn(
    engine: Engine, request: TurnRequest, on_event: Callable[[TurnEvent], None] | None = None
) -> TurnFinished:
    """Runs a turn to its end; `on_event` gets every event.

    Raises:
        KvchatError: the turn failed.
    """
    for event in engine.turn(request):
        if on_event:
            on_event(event)
    if not isinstance(event, TurnFinished):
        raise KvchatError(getattr(event, "reason", "The engine gave no answer."))
    return event


@dataclass(slots=True)
class Chat:
    """A conversation that grows by a question and an answer with every turn."""

    engine: Engine
    name: str
    max_tokens: int
    messages: list[PromptMessage] = field(default_factory=list)
    policy: EvictionPolicy = EvictionPolicy.TURNS
    evicted_messages: int = 0

    def ask(self, question: str, on_event: Callable[[TurnEvent], None] | None = None) -> TurnFinished:
        """One more turn, greedy.

        Raises:
            KvchatError: the turn failed.
        """
        self.messages.append(PromptMessage("user", question))
        request = TurnRequest(
            f"{self.name} {len(self.messages)}",
            self.name,
            tuple(self.messages),
            CacheMode.ON,
            Sampling(max_tokens=self.max_tokens),
            policy=self.policy,
            evicted_messages=self.evicted_messages,
        )
        finished = run_turn(self.engine, request, on_event)
        self.messages.append(
            PromptMessage("assistant", finished.text, finished.token_ids, finished.tokenizer)
        )
        self.evicted_messages = finished.evicted_messages
        return finished
