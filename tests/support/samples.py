"""Values that tests of sessions and stores need, and an engine that plays events written down beforehand."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvchat.contract import CacheCommand, PoolState, Tokens, TurnEvent, TurnFinished, TurnRequest, TurnStats

TOKENIZER = "0123456789abcdef"

FIGURES = TurnStats(
    cache_mode="on",
    prompt_tokens=30,
    reused_tokens=20,
    prefilled_tokens=10,
    generated_tokens=4,
    evaluated_tokens=13,
    ttft_s=0.125,
    prefill_s=0.1,
    decode_s=0.3,
    prefill_tok_s=100.0,
    decode_tok_s=10.0,
    kv_tokens=33,
    kv_bytes=4096,
    kv_used_bytes=3300,
    kv_dtype="fp32",
    weights_dtype="bf16",
    weights_bytes=123_456,
    path="eager bf16",
    rss_bytes=500_000_000,
    context_limit=1024,
    finish_reason="stop",
    reuse_note="system prompt edited",
    evicted_tokens=7,
    restored_tokens=9,
    restore_s=0.025,
)
"""Every field has another value, so that no two can be mixed up."""


NO_CACHES = PoolState((), 0, 0, 0, 0)


def piece(turn: str, text: str, *ids: int) -> Tokens:
    """A piece of an answer."""
    return Tokens(turn, text, ids, (0.01,) * len(ids), TOKENIZER, kv_tokens=5, kv_bytes=640)


def finished(turn: str, text: str, *ids: int, finish: str = "stop") -> TurnFinished:
    """The end of a turn."""
    return TurnFinished(turn, text, ids, TOKENIZER, replace(FIGURES, finish_reason=finish), NO_CACHES)


class PlayedEngine:
    """An engine that answers each turn with the next list of events; each gets the id of its turn."""

    def __init__(self, *turns: Sequence[TurnEvent]) -> None:
        self._turns = list(turns)
        self.requests: list[TurnRequest] = []
        self.stopped: list[str] = []

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        self.requests.append(request)
        for event in self._turns.pop(0):
            yield replace(event, turn=request.turn)

    def stop(self, turn: str) -> None:
        self.stopped.append(turn)

    def command(self, command: CacheCommand) -> None:
        pass

    def forget(self, conversation: str) -> None:
        pass

    def close(self) -> None:
        pass
