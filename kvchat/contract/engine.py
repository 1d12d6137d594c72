"""The engine as a front end sees it: facts about the model, its statuses, queries, and the `Engine` protocol.

Must not import tensors, widgets or files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kvchat.contract.cache import (
    CacheMap,
    Converted,
    Drop,
    Fork,
    Pin,
    PoolState,
    SetBudget,
    SetPrecision,
    Spill,
    Warm,
)
from kvchat.contract.turn import CostEstimate, EstimateCost, TurnEvent, TurnRequest


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The loaded model: shape, precision and sizes."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    kv_dtype_bytes: int
    weights_dtype: str
    weights_bytes: int
    context_limit: int
    """Tokens."""
    threads: int
    path: str
    """Which code decodes, for instance `eager bf16`."""
    tokenizer: str
    """Fingerprint of the tokenizer; token ids are valid for one tokenizer only."""
    notes: tuple[str, ...] = ()
    """What is special about this model's cache, in sentences."""
    gap_refusal: str = ""
    """Why policies that leave a gap can't be used with this model; empty where they can."""

    @property
    def kv_bytes_per_token(self) -> int:
        """2 (keys and values) × layers × KV heads × head dim × bytes of one number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_dtype_bytes


# ---- statuses ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loading:
    """The engine starts; `stage` names the step."""

    stage: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine takes turns from now on."""

    model: ModelFacts
    rss_bytes: int
    """Memory of the engine's process, with the weights in it."""


@dataclass(frozen=True, slots=True)
class Died:
    """The engine's process ended; its caches in memory are lost."""

    reason: str
    log_tail: tuple[str, ...] = ()
    for_good: bool = False
    """Whether it is not started again."""


# ---- queries ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inspect:
    """Asks what the cache of this conversation holds; answered by `CacheMap`. Changes nothing."""

    request: TurnRequest
    """The conversation's next turn: its messages say which tokens belong to which message."""


@dataclass(frozen=True, slots=True)
class CountTokens:
    """Asks how many tokens these texts have; answered by `TokenCounts`. Changes nothing."""

    key: str
    """Returned in the answer."""
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The number of tokens of each text."""

    key: str
    """Of the `CountTokens` that this answers."""
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A command that could not be executed."""

    reason: str


CacheCommand = (
    Pin | Spill | Warm | Drop | SetBudget | Fork | SetPrecision | EstimateCost | Inspect | CountTokens
)
Report = PoolState | CostEstimate | TokenCounts | Converted | CacheMap | Refused
Status = Loading | Ready | Died | Report


class Engine(Protocol):
    """Answers one turn at a time, with a KV cache for each conversation."""

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Yields `TurnStarted` first, then progress and tokens; ends with `TurnFinished` or `TurnFailed`."""
        ...

    def stop(self, turn: str) -> None:
        """Ends that turn soon, in prefill or decode; callable from any thread."""
        ...

    def command(self, command: CacheCommand) -> None:
        """Executes a command between turns; the result is reported as a `Report`."""
        ...

    def forget(self, conversation: str) -> None:
        """Frees the cache of a conversation, in memory and on disk; an unknown one is no error."""
        ...

    def close(self) -> None:
        """Saves what is not saved yet, and frees everything."""
        ...
