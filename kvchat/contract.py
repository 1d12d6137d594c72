"""The one page both sides sign: what crosses between a conversation and an engine.

Frozen values that carry text and the numbers that go with it. It knows no tensors, no widgets and no files,
so that either side can be replaced: by the in-process engine, by the engine in a child process, by a scripted
one in tests.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from kvchat.validation import bounds


class CacheMode(StrEnum):
    """What happens to the KV cache of a conversation."""

    ON = "on"
    """Kept across turns: a turn reads its new tokens only."""
    TURN = "turn"
    """Thrown away after each turn: every turn reads the whole history once."""
    OFF = "off"
    """Never made: every generated token reads the whole history again."""


class KVPrecision(StrEnum):
    """How keys and values are stored."""

    AUTO = "auto"
    """As the model computes them; under memory pressure in 8 bits, rather than dropped."""
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class EvictionPolicy(StrEnum):
    """What is dropped when the context is full; `kvchat.cache.eviction` has them."""

    NONE = "none"
    """Nothing: the answer ends, and the next one is refused."""
    TURNS = "turns"
    """The oldest whole turns; what stays is read again: exact."""
    SINKS = "sinks"
    """All but the first tokens and the latest ones, with a gap: approximate."""
    SNAPKV = "snapkv"
    """What the latest question hardly attends to, with gaps: approximate."""


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

    temperature: bounds.Temperature = 0.0
    """0 is greedy: always the most probable token."""
    top_p: bounds.TopP = 1.0
    top_k: bounds.TopK = 0
    """0 keeps every token."""
    min_p: bounds.MinP = 0.0
    repeat_penalty: bounds.RepeatPenalty = 1.0
    seed: bounds.Seed | None = None
    """None draws a new seed for every turn."""
    max_tokens: bounds.MaxTokens = 512


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """One message as the engine reads it."""

    role: bounds.PromptRole
    text: bounds.Text
    token_ids: tuple[bounds.TokenId, ...] = ()
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
    """The whole conversation. The last message is the user's, or an answer that is to be continued."""
    mode: CacheMode
    sampling: Sampling
    kv: KVPrecision = KVPrecision.AUTO
    policy: EvictionPolicy = EvictionPolicy.TURNS
    evicted_messages: bounds.LeftOut = 0
    """The oldest messages, system prompt aside, that an earlier eviction left out."""
    today: str = ""
    """The date that templates see, ISO 8601; frozen per conversation, so that midnight costs no cache."""
    persist: bool = True
    """Whether anything of it may be written to disk."""
    known_prefill_tok_s: bounds.Measured = 0.0
    """What earlier turns measured, for prices before this engine measured anything; 0 where none did."""


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
    notes: tuple[str, ...] = ()
    """What is special about this model's cache, in sentences."""
    gap_refusal: str = ""
    """Why policies that leave a gap can't be used with this model; empty where they can."""

    @property
    def kv_bytes_per_token(self) -> int:
        """2 (keys and values) × layers × KV heads × head dim × bytes of one number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_dtype_bytes


@dataclass(frozen=True, slots=True)
class TurnStats:
    """The figures of one turn. Measured; seconds are floats, bytes and tokens whole numbers.

    `prompt_tokens == reused_tokens + prefilled_tokens`.
    """

    cache_mode: bounds.Text
    prompt_tokens: bounds.CountTokens
    reused_tokens: bounds.CountTokens
    prefilled_tokens: bounds.CountTokens
    generated_tokens: bounds.CountTokens
    """The end-of-turn id counts."""
    evaluated_tokens: bounds.CountTokens
    """Every token run through the model: the price of `off`."""
    ttft_s: bounds.Measured
    """From the request handed to the engine until the first text."""
    prefill_s: bounds.Measured
    decode_s: bounds.Measured
    prefill_tok_s: bounds.Measured
    decode_tok_s: bounds.Measured
    """(generated_tokens - 1) / decode_s."""
    kv_tokens: bounds.CountTokens
    kv_bytes: bounds.CountTokens
    """Storage, with its growth slack."""
    kv_used_bytes: bounds.CountTokens
    """The formula times `kv_tokens`."""
    kv_dtype: bounds.Text
    weights_dtype: bounds.Text
    weights_bytes: bounds.CountTokens
    path: bounds.Text
    rss_bytes: bounds.CountTokens
    """Memory of the engine's process."""
    context_limit: bounds.CountTokens
    finish_reason: bounds.Finish
    reuse_note: bounds.Text
    """Why less was reused than the history; empty when everything was."""
    evicted_tokens: bounds.CountTokens = 0
    """Dropped in this turn because the context was full."""
    restored_tokens: bounds.CountTokens = 0
    """Those of the reused ones that came from disk in this turn."""
    restore_s: bounds.Measured = 0.0
    drafted_tokens: bounds.CountTokens = 0
    """Guessed ahead of the model, and checked by it."""
    accepted_tokens: bounds.CountTokens = 0
    """Of the drafted ones, those that the model would have chosen itself."""


class TokenStatus(StrEnum):
    """What a turn did with a token."""

    REUSED = "reused"
    """It was in the cache."""
    READ = "read"
    """It went through the model and is in the cache now."""
    WRITTEN = "written"
    """The model generated it."""
    EVICTED = "evicted"
    """The model doesn't see it any more: the context was full."""
    UNCACHED = "never cached"
    """Without a cache: read again for every token of the answer."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Tokens of one message that a turn treated alike."""

    message: int
    """Place in `TurnRequest.messages`; the answer's is one more than the last, unless it goes on with it."""
    fate: TokenStatus
    tokens: int
    """0 where a message was left out as a whole, and nobody counted it."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why tokens that were read before have to be read again."""

    cause: str
    """What happened, in words."""
    tokens: int
    """To read again."""
    seconds: float | None
    """What that costs at the prefill rate measured so far; None before any was measured."""
    token: int | None = None
    """Index of the first token that differs; None where there was no cache to compare with."""
    was: str = ""
    """The cached text from there on, shortened."""
    now: str = ""
    """The prompt's text from there on, shortened."""
    message: int | None = None
    """The message it stands in: 0 is the system prompt and the template's own words, 1 the first message."""
    before: str = ""
    """The text right before it, which both have."""


class CacheEventKind(StrEnum):
    """What can happen to a cache."""

    REUSE = "reuse"
    MISS = "miss"
    EVICT = "evict"
    SAVE = "save"
    SPILL = "spill"
    RESTORE = "restore"
    REFUSE = "refuse"
    """What lay on disk could not be used."""
    FORK = "fork"
    SHARE = "share"
    """The prefix of another conversation's cache is used, copy-on-write."""
    CONVERT = "convert"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One line of a conversation's timeline: nothing happens to a cache without one."""

    conversation: str
    kind: CacheEventKind
    tokens: int
    bytes: int = 0
    seconds: float = 0.0
    note: str = ""
    at: float = 0.0
    """Seconds since 1970."""


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
    for_good: bool = False
    """Whether it is not started again."""


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The prompt is known: what is reused and what has to be read."""

    turn: str
    prompt_tokens: int
    reused_tokens: int
    prefilled_tokens: int
    reuse_note: str
    miss: Miss | None = None
    restored_tokens: int = 0
    spans: tuple[TokenSpan, ...] = ()
    """What happens to every message, in order."""


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
    """A conversation whose KV cache is in memory, or on disk."""

    conversation: str
    tokens: int
    bytes: int
    """In memory; memory that forks share counts for each of them."""
    disk_bytes: int = 0
    kv_dtype: str = ""
    pinned: bool = False
    next_to_go: bool = False
    last_used: float = 0.0
    """Seconds since 1970."""

    @property
    def hot(self) -> bool:
        """Whether it is in memory."""
        return self.bytes > 0


@dataclass(frozen=True, slots=True)
class PoolState:
    """Every cache there is, and what they may take."""

    caches: tuple[WarmCache, ...]
    used_bytes: int
    """In memory, each piece counted once."""
    budget_bytes: int
    disk_bytes: int
    disk_cap_bytes: int
    events: tuple[CacheEvent, ...] = ()
    """What happened since the last report."""
    free_bytes: int = 0
    """Memory that the system could still give; 0 where that is not known."""
    draft_bytes: int = 0
    """Of those in memory, what a draft model holds for itself."""


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The whole answer and its figures."""

    turn: str
    text: str
    token_ids: tuple[int, ...]
    """Without the end-of-turn id: the template writes that one."""
    tokenizer: str
    stats: TurnStats
    pool: PoolState
    evicted_messages: int = 0
    """The oldest messages that are left out from now on; `TurnRequest.evicted_messages` of the next turn."""
    spans: tuple[TokenSpan, ...] = ()
    """What happened to every message, in order."""


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """No answer; the engine lives and the cache is back where it was before the turn, or further along it."""

    turn: str
    reason: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """The context was full, and something was dropped in the middle of a turn."""

    turn: str
    tokens: int
    note: str
    evicted_messages: int


@dataclass(frozen=True, slots=True)
class Pin:
    """Keeps a cache in memory longer than the others, or no longer."""

    conversation: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Spill:
    """Moves a cache out of memory: to disk where that is allowed, else away."""

    conversation: str


@dataclass(frozen=True, slots=True)
class Warm:
    """Brings a cache from disk into memory."""

    conversation: str
    kv: KVPrecision = KVPrecision.AUTO


@dataclass(frozen=True, slots=True)
class Drop:
    """Frees a cache in memory and on disk; the text stays."""

    conversation: str


@dataclass(frozen=True, slots=True)
class SetBudget:
    """Changes how many bytes all caches may take in memory."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Gives a new conversation the cache of another, shared until one of them writes."""

    parent: str
    child: str


@dataclass(frozen=True, slots=True)
class SetPrecision:
    """Stores a cache's keys and values in another precision from now on; answered by `Converted`."""

    conversation: str
    kv: KVPrecision


@dataclass(frozen=True, slots=True)
class EstimateCost:
    """What would this turn cost, were it asked now? Answered by `Quote`; nothing happens."""

    key: str
    request: TurnRequest


@dataclass(frozen=True, slots=True)
class Inspect:
    """What does the cache of this conversation hold? Answered by `CacheMap`; nothing happens."""

    request: TurnRequest
    """The next turn as it would be: its messages say whose tokens are whose."""


@dataclass(frozen=True, slots=True)
class CountTokens:
    """How many tokens are these texts? Answered by `Counted`; nothing happens."""

    key: str
    texts: tuple[str, ...]


CacheCommand = (
    Pin | Spill | Warm | Drop | SetBudget | Fork | SetPrecision | EstimateCost | Inspect | CountTokens
)


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """The price of a turn before it is asked."""

    key: str
    prompt_tokens: int
    reused_tokens: int
    prefilled_tokens: int
    seconds: float | None
    """Of reading the unread tokens at the measured rate; None before any was measured."""
    miss: Miss | None
    preview: str
    """What the request's eviction policy would drop if the context were full now, and what that costs."""
    refusal: str = ""
    """Why the turn could not be answered at all."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of each text that was counted."""

    key: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Converted:
    """A cache is stored in another precision."""

    conversation: str
    kv_dtype: str
    bytes_before: int
    bytes_after: int
    compared_tokens: int
    agreeing_tokens: int
    """Of the compared ones, how many the model would still have chosen first."""
    note: str = ""
    """Where nothing was converted: why not, and what happens instead."""


@dataclass(frozen=True, slots=True)
class CacheBlock:
    """Tokens in a row that are alike in everything told here."""

    start: int
    """The first one's place among all tokens that were read."""
    tokens: int
    message: int | None
    """Place in the request's messages; None for tokens that are no part of the conversation any more."""
    role: str
    """Of that message; `template` for what the template puts before an answer, empty without a message."""
    text: str
    held: bool
    """In memory; with neither this nor `saved`, it was evicted."""
    saved: bool
    """On disk."""
    precision: str
    """How keys and values of these tokens are stored."""
    bytes: int
    """Of these tokens in all layers that keep keys and values, in memory, without growth slack."""
    sink: bool = False
    """One of the first tokens, which attention leans on and no policy drops."""
    shared: bool = False
    """In memory that another conversation uses too."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one kind."""

    kind: str
    """`full`, `sliding`, `chunked`, `recurrent`, `convolution`, `hybrid`."""
    layers: int
    window: int
    """Tokens back that a query sees; 0 where it sees all of them."""
    bytes: int
    """In memory, growth slack included; what forks share counts here too."""


@dataclass(frozen=True, slots=True)
class CacheMap:
    """A conversation's cache, token by token, as plain values."""

    conversation: str
    blocks: tuple[CacheBlock, ...]
    layers: tuple[LayerGroup, ...]
    bytes: int
    """In memory, growth slack and the copies of recurrent states included."""
    disk_bytes: int
    shared_with: tuple[str, ...] = ()
    """Conversations that use some of the same memory."""
    note: str = ""
    """Why there is nothing to show."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A cache act that could not be done."""

    reason: str


TurnEvent = TurnStarted | PrefillProgress | Tokens | Evicted | TurnFinished | TurnFailed
Report = PoolState | CostEstimate | TokenCounts | Converted | CacheMap | Refused
Status = Loading | Ready | Died | Report


class Engine(Protocol):
    """Answers one turn at a time and keeps a KV cache for each conversation."""

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Yields `TurnStarted` first, then progress and tokens; ends with `TurnFinished` or `TurnFailed`."""
        ...

    def stop(self, turn: str) -> None:
        """Ends that turn soon, wherever it is; callable from any thread."""
        ...

    def command(self, act: CacheCommand) -> None:
        """Does something to the caches, between turns; what came of it is reported as a `Report`."""
        ...

    def forget(self, conversation: str) -> None:
        """Frees the cache of a conversation, in memory and on disk; unknown ones are no error."""
        ...

    def close(self) -> None:
        """Saves what is not saved, and frees everything."""
        ...
