"""KV caches as plain values: modes, commands that change a cache, events, sizes and the cache map.

The lowest page of the contract. Must not import tensors, widgets, files, or the other pages.
"""

from dataclasses import dataclass
from enum import StrEnum


class CacheMode(StrEnum):
    """What happens to the KV cache of a conversation."""

    ON = "on"
    """Reused across turns: a turn prefills its new tokens only."""
    TURN = "turn"
    """Dropped after each turn: every turn prefills the whole history once."""
    OFF = "off"
    """No cache: every generated token recomputes the whole history."""


class KVPrecision(StrEnum):
    """How keys and values are stored."""

    AUTO = "auto"
    """As the model computes them; under memory pressure quantised to 8 bits before anything is evicted."""
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class EvictionPolicy(StrEnum):
    """Which tokens are evicted when the context is full; implemented in `kvchat.cache.eviction`."""

    NONE = "none"
    """None: the answer ends, and the next turn fails."""
    TURNS = "turns"
    """The oldest whole turns; the rest is prefilled again: exact."""
    SINKS = "sinks"
    """All but the first tokens (attention sinks) and the latest ones, which leaves a gap: approximate."""
    SNAPKV = "snapkv"
    """Tokens that the latest question attends to least, which leaves gaps: approximate."""


class CacheEventKind(StrEnum):
    """What can happen to a cache. The values are stored in the database."""

    REUSE = "reuse"
    MISS = "miss"
    EVICT = "evict"
    SAVE = "save"
    SPILL = "spill"
    RESTORE = "restore"
    REFUSE = "refuse"
    """A saved cache could not be used, or a cache could not be saved."""
    FORK = "fork"
    SHARE = "share"
    """Another conversation's prefix was shared."""
    CONVERT = "convert"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One entry of a conversation's event log. Every change of a cache writes one."""

    conversation: str
    kind: CacheEventKind
    tokens: int
    bytes: int = 0
    seconds: float = 0.0
    note: str = ""
    at: float = 0.0
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class WarmCache:
    """A conversation whose KV cache is in memory or on disk."""

    conversation: str
    tokens: int
    bytes: int
    """In memory; memory that forks share counts for each of them."""
    disk_bytes: int = 0
    kv_dtype: str = ""
    pinned: bool = False
    next_evicted: bool = False
    """Whether this cache is evicted first when memory runs out."""
    last_used: float = 0.0
    """Seconds since 1970."""

    @property
    def hot(self) -> bool:
        """Whether it is in memory."""
        return self.bytes > 0


@dataclass(frozen=True, slots=True)
class PoolState:
    """Every cache, and the limits in memory and on disk."""

    caches: tuple[WarmCache, ...]
    used_bytes: int
    """In memory; shared memory counts once."""
    budget_bytes: int
    disk_bytes: int
    disk_cap_bytes: int
    events: tuple[CacheEvent, ...] = ()
    """New since the last report."""
    free_bytes: int = 0
    """Available memory of the system; 0 where that is unknown."""
    draft_bytes: int = 0
    """Part of `used_bytes`: the caches of the draft model."""


# ---- commands ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pin:
    """Sets whether a cache is evicted from memory only after all caches that are not pinned."""

    conversation: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Spill:
    """Moves a cache from memory to disk; drops it where nothing may be written to disk."""

    conversation: str


@dataclass(frozen=True, slots=True)
class Warm:
    """Loads a cache from disk into memory."""

    conversation: str
    kv: KVPrecision = KVPrecision.AUTO


@dataclass(frozen=True, slots=True)
class Drop:
    """Frees a cache in memory and on disk; the messages stay."""

    conversation: str


@dataclass(frozen=True, slots=True)
class SetBudget:
    """Sets how many bytes all caches together may take in memory."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Gives a new conversation the cache of another one, copy-on-write."""

    parent: str
    child: str


@dataclass(frozen=True, slots=True)
class SetPrecision:
    """Converts a cache's keys and values to another precision; answered by `Converted`."""

    conversation: str
    kv: KVPrecision


@dataclass(frozen=True, slots=True)
class Converted:
    """A cache is stored in another precision."""

    conversation: str
    kv_dtype: str
    bytes_before: int
    bytes_after: int
    compared_tokens: int
    agreeing_tokens: int
    """Of the compared tokens, those where the most probable next token stayed the same."""
    note: str = ""
    """Why nothing was converted, and what happens instead; empty where it was."""


# ---- the cache map ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CacheBlock:
    """A run of adjacent tokens with the same attributes."""

    start: int
    """Position of the first token in the conversation's token sequence."""
    tokens: int
    message: int | None
    """Index in the request's messages; None for tokens that belong to no message any more."""
    role: str
    """Of that message; `template` for what the template writes before an answer, empty without a message."""
    text: str
    in_memory: bool
    """Where neither this nor `on_disk` holds, the tokens were evicted."""
    on_disk: bool
    precision: str
    """How keys and values of these tokens are stored."""
    bytes: int
    """Of these tokens in all layers with keys and values, in memory, without growth slack."""
    sink: bool = False
    """Attention sink: one of the first tokens, which no policy evicts."""
    shared: bool = False
    """In memory that another conversation uses too."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one kind."""

    kind: str
    """`full`, `sliding`, `chunked`, `recurrent`, `convolution`, `hybrid`."""
    layers: int
    window: int
    """Attention window in tokens; 0 where it is the whole context."""
    bytes: int
    """In memory, with growth slack and with memory that forks share."""


@dataclass(frozen=True, slots=True)
class CacheMap:
    """A conversation's cache, token by token."""

    conversation: str
    blocks: tuple[CacheBlock, ...]
    layers: tuple[LayerGroup, ...]
    bytes: int
    """In memory, with growth slack and checkpoints of recurrent states."""
    disk_bytes: int
    shared_with: tuple[str, ...] = ()
    """Conversations that use some of the same memory."""
    note: str = ""
    """Why the map is empty."""
