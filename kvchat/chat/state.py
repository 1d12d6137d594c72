"""What a front end draws: one frozen value, made by the reducer out of events. Plain values; no widgets."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvchat.chat.active_turn import NotSent
from kvchat.contract import (
    CacheMode,
    Converted,
    Evicted,
    EvictionPolicy,
    Miss,
    ModelFacts,
    PoolState,
    TurnStarted,
    TurnStats,
    WarmCache,
)

ENOUGH_TOKENS = 64
"""A prefill rate measured over fewer tokens says more about overhead than about reading."""


@dataclass(frozen=True, slots=True)
class TurnFigures:
    """The turn under way or the last one; what is not known yet is None."""

    reused: int = 0
    read: int = 0
    written: int = 0
    ttft_s: float | None = None
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    kv_tokens: int = 0
    kv_bytes: int = 0
    reuse_note: str = ""
    reading: str = ""
    """Progress of a long prefill."""
    restored: int = 0
    """Of the reused ones, those that came from disk in this turn."""
    evicted: int = 0
    kv_dtype: str = ""
    """Empty before the first turn: as the model computes."""
    limit: int = 0
    """Tokens that fit; 0 before the first turn."""
    drafted: int = 0
    accepted: int = 0

    @property
    def context(self) -> int:
        """Tokens of the conversation so far."""
        return self.reused + self.read + self.written


@dataclass(frozen=True, slots=True)
class TurnUnderWay:
    """The turn that is being answered, in whichever conversation."""

    turn: str
    conversation: str
    asked_at: float
    """On the reducer's clock; 0 where the first text came while another conversation was open."""
    text: str = ""
    """Of the whole answer so far."""
    written: int = 0
    """Tokens of this turn."""
    started: TurnStarted | None = None
    evictions: tuple[Evicted, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatState:
    """Everything that a front end draws of the open conversation, the engine and its caches."""

    conversation: str = ""
    """Id of the open one."""
    mode: CacheMode = CacheMode.ON
    policy: EvictionPolicy = EvictionPolicy.TURNS
    model_name: str = ""
    """Of the model that answers: a card's name, or a folder."""
    model_title: str = ""
    model: ModelFacts | None = None
    """None before an engine was ready."""
    status: str = "starting"
    """What the engine does, in words."""
    ready: bool = False
    """Whether the engine takes turns."""
    gone: bool = False
    """Whether the engine ended and is not started again."""
    active: TurnUnderWay | None = None
    turn: TurnFigures = field(default_factory=TurnFigures)
    """Of the open conversation: its turn under way, or its last one."""
    step_ms: tuple[float, ...] = ()
    """Milliseconds of the latest tokens."""
    last_miss: Miss | None = None
    """Of the open conversation's turn in this run."""
    rss_bytes: int = 0
    largest_prefill: TurnStats | None = None
    """The turn of this run, or of a conversation that was opened, that the rate of reading comes from."""
    pool: PoolState | None = None
    """None while no engine is ready."""
    by_mode: Mapping[str, TurnStats] = field(default_factory=dict)
    """The last turn's figures in each mode."""
    turns: tuple[TurnStats, ...] = ()
    """Every finished turn of the open conversation, oldest first."""
    converted: Converted | None = None
    """What came of the last change of precision."""
    not_sent: NotSent | None = None
    """The question of the last turn, where that one failed before its answer began."""

    @property
    def caches(self) -> Mapping[str, WarmCache]:
        """The caches in memory and on disk, by their conversations."""
        return {cache.conversation: cache for cache in self.pool.caches} if self.pool else {}

    @property
    def others_bytes(self) -> int:
        """What the caches of all other conversations take in memory."""
        own = self.caches.get(self.conversation)
        return max(0, self.pool.used_bytes - (own.bytes if own else 0)) if self.pool else 0

    @property
    def prefill_rate(self) -> float:
        """Tokens a second that the model reads; 0 where no prefill was long enough to tell."""
        return self.largest_prefill.prefill_tok_s if self.largest_prefill else 0.0

    @property
    def active_here(self) -> TurnUnderWay | None:
        """The turn under way, if it is one of the open conversation."""
        return self.active if self.active and self.active.conversation == self.conversation else None


def largest_prefill(turns: Iterable[TurnStats]) -> TurnStats | None:
    """The turn whose prefill tells how fast the model reads; None where none was long enough.

    The one rule for it: the panel, the cost of another model, the tour and the hint to the engine use it.
    """
    long = [stats for stats in turns if stats.prefilled_tokens >= ENOUGH_TOKENS and stats.prefill_tok_s]
    return max(long, key=lambda stats: stats.prefilled_tokens, default=None)


def figures_of(stats: TurnStats) -> TurnFigures:
    """The measured figures of a finished turn."""
    return TurnFigures(
        reused=stats.reused_tokens,
        read=stats.prefilled_tokens,
        written=stats.generated_tokens,
        ttft_s=stats.ttft_s,
        prefill_tok_s=stats.prefill_tok_s,
        decode_tok_s=stats.decode_tok_s,
        kv_tokens=stats.kv_tokens,
        kv_bytes=stats.kv_bytes,
        reuse_note=stats.reuse_note,
        restored=stats.restored_tokens,
        evicted=stats.evicted_tokens,
        kv_dtype=stats.kv_dtype,
        limit=stats.context_limit,
        drafted=stats.drafted_tokens,
        accepted=stats.accepted_tokens,
    )
