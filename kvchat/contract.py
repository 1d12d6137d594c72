"""The one page both sides sign: what crosses between a conversation and an engine.

Frozen values that carry text and the numbers that go with it. It knows no tensors, no widgets and no files,
so that either side can be replaced: by the in-process engine, by the engine in a child process, by a scripted
one in tests.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class CacheMode(StrEnum):
    """What happens to the KV cache of a conversation."""

    ON = "on"
    """Kept across turns: a turn reads its new tokens only."""
    TURN = "turn"
    """Thrown away after each turn: every turn reads the whole history once."""
    OFF = "off"
    """Never made: every generated token reads the whole history again."""


class FinishReason(StrEnum):
    """Why a turn ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    CONTEXT = "context"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 is greedy: always the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    """None draws a new seed for every turn."""
    max_tokens: int = 512


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """One message as the engine reads it."""

    role: str
    text: str
    token_ids: tuple[int, ...] = ()
    """The ids the model generated for this text; empty for typed text."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer that `token_ids` belong to."""


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """Everything an engine needs to answer."""

    turn: str
    """Identifies this turn, so that a stop meant for it can't hit another."""
    conversation: str
    messages: tuple[PromptMessage, ...]
    """The whole conversation; the last message is the user's."""
    mode: CacheMode
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is loaded, as far as a screen wants to tell."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    kv_dtype_bytes: int
    weights_dtype: str
    weights_bytes: int
    context_limit: int
    threads: int
    path: str
    """Which code decodes, for instance `eager bf16`."""
    tokenizer: str
    """Fingerprint: token ids belong to it."""

    @property
    def kv_bytes_per_token(self) -> int:
        """2 (keys and values) × layers × KV heads × head dim × bytes of one number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_dtype_bytes


@dataclass(frozen=True, slots=True)
class TurnStats:
    """The figures of one turn. Measured; seconds are floats, bytes and tokens whole numbers.

    `prompt_tokens == reused_tokens + prefilled_tokens`.
    """

    cache_mode: str
    prompt_tokens: int
    reused_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    """The end-of-turn id counts."""
    evaluated_tokens: int
    """Every token run through the model: the price of `off`."""
    ttft_s: float
    """From the request handed to the engine until the first text."""
    prefill_s: float
    decode_s: float
    prefill_tok_s: float
    decode_tok_s: float
    """(generated_tokens - 1) / decode_s."""
    kv_tokens: int
    kv_bytes: int
    """Storage, with its growth slack."""
    kv_used_bytes: int
    """The formula times `kv_tokens`."""
    kv_dtype: str
    weights_dtype: str
    weights_bytes: int
    path: str
    rss_bytes: int
    """Memory of the engine's process."""
    context_limit: int
    finish_reason: str
    reuse_note: str
    """Why less was reused than the history; empty when everything was."""


@dataclass(frozen=True, slots=True)
class Loading:
    """The engine is on its way; `stage` says what it does."""

    stage: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine takes turns from now on."""

    model: ModelFacts
    rss_bytes: int
    """Memory of the engine's process, with the weights in it."""


@dataclass(frozen=True, slots=True)
class Died:
    """The engine's process ended; everything it held warm is gone."""

    reason: str
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The prompt is known: what is reused and what has to be read."""

    turn: str
    prompt_tokens: int
    reused_tokens: int
    prefilled_tokens: int
    reuse_note: str


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """A chunk of the prompt was read."""

    turn: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Text that became readable, with every token that was generated for it."""

    turn: str
    text: str
    token_ids: tuple[int, ...]
    step_s: tuple[float, ...]
    """Seconds each of `token_ids` took."""
    tokenizer: str
    """Fingerprint: `token_ids` belong to it."""
    kv_tokens: int
    kv_bytes: int

    def joined(self, later: "Tokens") -> "Tokens":
        """This batch and the one after it as one."""
        return Tokens(
            self.turn,
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.step_s + later.step_s,
            later.tokenizer,
            later.kv_tokens,
            later.kv_bytes,
        )


@dataclass(frozen=True, slots=True)
class WarmCache:
    """A conversation whose KV cache is in memory."""

    conversation: str
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The whole answer and its figures."""

    turn: str
    text: str
    token_ids: tuple[int, ...]
    """Without the end-of-turn id: the template writes that one."""
    tokenizer: str
    stats: TurnStats
    warm: tuple[WarmCache, ...]


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """No answer; the engine lives and the cache is back where it was before the turn, or further along it."""

    turn: str
    reason: str


TurnEvent = TurnStarted | PrefillProgress | Tokens | TurnFinished | TurnFailed
Status = Loading | Ready | Died


class Engine(Protocol):
    """Answers one turn at a time and keeps a KV cache for each conversation."""

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Yields `TurnStarted` first, then progress and tokens; ends with `TurnFinished` or `TurnFailed`."""
        ...

    def stop(self, turn: str) -> None:
        """Ends that turn soon, wherever it is; callable from any thread."""
        ...

    def forget(self, conversation: str) -> None:
        """Frees the cache of a conversation; unknown ones are no error."""
        ...

    def close(self) -> None:
        """Frees everything."""
        ...
