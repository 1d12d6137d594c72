"""Which cache is evicted from memory when the budget is full, and how.

Order: least recently used first; then pinned caches; then shared system prefixes; the active conversation
never. How: spilled to disk where that is allowed (exact, can be restored); else quantised if its precision
is automatic; else dropped, and its conversation has to be prefilled again. Must not import tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

SHARE_OF_MEMORY = 4
"""Without a budget, caches take one part in so many of the memory that the loaded model leaves."""


def default_budget(free_bytes: int) -> int:
    """Bytes for all caches where nobody set a budget."""
    return free_bytes // SHARE_OF_MEMORY


class EvictionAction(StrEnum):
    """What happens to a cache that is evicted."""

    SPILL = "spill"
    """Written to disk; restored exactly when it is needed."""
    QUANTISE = "quantise"
    """Stored in 8 bits; approximate from then on."""
    DROP = "drop"
    """Freed; the conversation's next turn prefills it again."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One cache in memory."""

    conversation: str
    last_used: float
    """Of any monotonic clock."""
    pinned: bool = False
    active: bool = False
    can_spill: bool = False
    can_quantise: bool = False
    prefix_only: bool = False
    """Only its system prefix is in memory, which other conversations can share."""


def eviction_order(caches: Iterable[Candidate]) -> list[Candidate]:
    """The caches in the order in which they are evicted, without the active one."""
    candidates = (each for each in caches if not each.active)
    return sorted(candidates, key=lambda each: (each.prefix_only, each.pinned, each.last_used))


def next_eviction(caches: Iterable[Candidate]) -> tuple[str, EvictionAction] | None:
    """(conversation, what happens to its cache); None when only the active one is left."""
    order = eviction_order(caches)
    if not order:
        return None
    first = order[0]
    if first.can_spill:
        return first.conversation, EvictionAction.SPILL
    if first.can_quantise:
        return first.conversation, EvictionAction.QUANTISE
    return first.conversation, EvictionAction.DROP
