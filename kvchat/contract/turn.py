"""One turn as plain values: the request, its events, its statistics, and the estimate of its cost.

Must not import tensors, widgets, files or `contract.engine`.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvchat.contract.cache import CacheMode, EvictionPolicy, KVPrecision, PoolState
from kvchat.validation import bounds


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
    """0 disables top-k."""
    min_p: bounds.MinP = 0.0
    repeat_penalty: bounds.RepeatPenalty = 1.0
    seed: bounds.Seed | None = None
    """None draws a new seed for every turn."""
    max_tokens: bounds.MaxTokens = 512


# ---- requests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """One message of a prompt."""

    role: bounds.PromptRole
    text: bounds.Text
    token_ids: tuple[bounds.TokenId, ...] = ()
    """The ids the model generated for this text; empty for typed text."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer that `token_ids` belong to."""


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """Everything an engine needs for one answer."""

    turn: str
    """Identifies this turn; `Engine.stop` takes it, so that a late stop can't end another turn."""
    conversation: str
    messages: tuple[PromptMessage, ...]
    """The whole conversation. The last message is the user's, or an answer that is to be continued."""
    mode: CacheMode
    sampling: Sampling
    kv: KVPrecision = KVPrecision.AUTO
    policy: EvictionPolicy = EvictionPolicy.TURNS
    evicted_messages: bounds.MessageCount = 0
    """The oldest messages, not counting the system prompt, that earlier turns evicted."""
    today: str = ""
    """The date for chat templates, ISO 8601; fixed per conversation: a new one invalidates the cache."""
    persist: bool = True
    """Whether the cache may be written to disk."""
    known_prefill_tok_s: bounds.Measured = 0.0
    """Prefill rate of earlier turns, for cost estimates before this engine's first prefill; 0 without one."""


@dataclass(frozen=True, slots=True)
class EstimateCost:
    """Asks what this turn would cost; answered by `CostEstimate`. Changes nothing."""

    key: str
    """Returned in the answer."""
    request: TurnRequest


# ---- what a turn did --------------------------------------------------------------------------------------


class TokenStatus(StrEnum):
    """What a turn did with a token."""

    REUSED = "reused"
    """It was in the cache."""
    READ = "read"
    """It was prefilled and is in the cache now."""
    WRITTEN = "written"
    """The model generated it."""
    EVICTED = "evicted"
    """The context was full; the model doesn't see it any more."""
    UNCACHED = "never cached"
    """Without a cache: recomputed for every token of the answer."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Tokens of one message that have the same status."""

    message: int
    """Index in `TurnRequest.messages`; a new answer's is one more than the last."""
    status: TokenStatus
    tokens: int
    """0 for a message that was evicted as a whole and not tokenised."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why tokens that were prefilled before have to be prefilled again."""

    cause: str
    """What happened, as a sentence."""
    tokens: int
    """To prefill again."""
    seconds: float | None
    """Their cost at the prefill rate measured so far; None before any was measured."""
    token: int | None = None
    """Index of the first token that differs; None where there was no cache to compare with."""
    was: str = ""
    """The cached text from there on, shortened."""
    now: str = ""
    """The prompt's text from there on, shortened."""
    message: int | None = None
    """The message with that token: 0 is the system prompt and the template's text, 1 the first message."""
    before: str = ""
    """The common text right before the difference."""


@dataclass(frozen=True, slots=True)
class TurnStats:
    """The measurements of one turn. Seconds are floats, bytes and tokens whole numbers.

    `prompt_tokens == reused_tokens + prefilled_tokens`.
    """

    cache_mode: bounds.Text
    prompt_tokens: bounds.CountTokens
    reused_tokens: bounds.CountTokens
    prefilled_tokens: bounds.CountTokens
    generated_tokens: bounds.CountTokens
    """With the end-of-turn id."""
    evaluated_tokens: bounds.CountTokens
    """Every token run through the model: the cost of mode `off`."""
    ttft_s: bounds.Measured
    """From the engine's start on the request until the first text."""
    prefill_s: bounds.Measured
    decode_s: bounds.Measured
    prefill_tok_s: bounds.Measured
    decode_tok_s: bounds.Measured
    """(generated_tokens - 1) / decode_s."""
    kv_tokens: bounds.CountTokens
    kv_bytes: bounds.CountTokens
    """Allocated, with growth slack."""
    kv_used_bytes: bounds.CountTokens
    """`kv_tokens` × `ModelFacts.kv_bytes_per_token`."""
    kv_dtype: bounds.Text
    weights_dtype: bounds.Text
    weights_bytes: bounds.CountTokens
    path: bounds.Text
    """Which code decoded; see `ModelFacts.path`."""
    rss_bytes: bounds.CountTokens
    """Memory of the engine's process."""
    context_limit: bounds.CountTokens
    finish_reason: bounds.Finish
    reuse_note: bounds.Text
    """Why less than the history was reused; empty when all of it was."""
    evicted_tokens: bounds.CountTokens = 0
    """Evicted in this turn because the context was full."""
    restored_tokens: bounds.CountTokens = 0
    """Part of `reused_tokens`: loaded from disk in this turn."""
    restore_s: bounds.Measured = 0.0
    drafted_tokens: bounds.CountTokens = 0
    """Proposed by speculative decoding."""
    accepted_tokens: bounds.CountTokens = 0
    """Part of `drafted_tokens`: those that the model itself would have chosen."""


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """The cost of a turn that was not run."""

    key: str
    """Of the `EstimateCost` that this answers."""
    prompt_tokens: int
    reused_tokens: int
    prefilled_tokens: int
    seconds: float | None
    """For `prefilled_tokens` at the measured rate; None before any was measured."""
    miss: Miss | None
    preview: str
    """What the request's eviction policy would evict if the context were full now, and what that costs."""
    refusal: str = ""
    """Why the turn can't be answered; empty where it can."""


# ---- events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The prompt is tokenised: what is reused and what has to be prefilled."""

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
    """A chunk of the prompt was prefilled."""

    turn: str
    done: int
    """Tokens so far."""
    total: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """New text of the answer, with every token that was generated for it."""

    turn: str
    text: str
    token_ids: tuple[int, ...]
    step_s: tuple[float, ...]
    """Seconds for each of `token_ids`."""
    tokenizer: str
    """Fingerprint of the tokenizer that `token_ids` belong to."""
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
class Evicted:
    """The context was full, and tokens were evicted during the turn."""

    turn: str
    tokens: int
    note: str
    evicted_messages: int


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The whole answer and its measurements."""

    turn: str
    text: str
    token_ids: tuple[int, ...]
    """Without the end-of-turn id, which the template writes."""
    tokenizer: str
    stats: TurnStats
    pool: PoolState
    evicted_messages: int = 0
    """`TurnRequest.evicted_messages` of the next turn."""
    spans: tuple[TokenSpan, ...] = ()
    """What happened to every message, in order."""


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """There is no answer. The engine goes on; the cache holds at least what it held before the turn."""

    turn: str
    reason: str


TurnEvent = TurnStarted | PrefillProgress | Tokens | Evicted | TurnFinished | TurnFailed
