"""Which conversation's cache makes room for another's, decided in byte counts and times of use.

The order: the least recently used first, pinned ones after the others, system prefixes that chats share
last; the active conversation never. What happens to it: it goes to disk where it can (exact, it comes
back); where it can't, it is stored in fewer bits if its owner left that open; else it is dropped and has to
be read again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

SHARE_OF_MEMORY = 4
"""Without a budget, caches take one part in so many of the memory that the loaded model leaves."""


def default_budget(free_bytes: int) -> int:
    """Bytes for all caches where nobody set a budget."""
    return free_bytes // SHARE_OF_MEMORY


class Relief(StrEnum):
    """What happens to a cache that has to make room."""

    SPILL = "spill"
    """To disk; restored exactly when it is needed."""
    QUANTISE = "quantise"
    """Into 8 bits; approximate from then on."""
    DROP = "drop"
    """Gone; the conversation is read again when it goes on."""


@dataclass(frozen=True, slots=True)
class Held:
    """One cache in memory."""

    conversation: str
    last_used: float
    """Any clock that only goes forward."""
    pinned: bool = False
    active: bool = False
    can_spill: bool = False
    can_quantise: bool = False
    prefix_only: bool = False
    """Nothing is left of it but the system prefix, which other conversations can share."""


def eviction_order(held: Iterable[Held]) -> list[Held]:
    """Who goes first; the active one is not among them."""
    candidates = (each for each in held if not each.active)
    return sorted(candidates, key=lambda each: (each.prefix_only, each.pinned, each.last_used))


def next_relief(held: Iterable[Held]) -> tuple[str, Relief] | None:
    """(conversation, what happens to it); None when only the active one is left."""
    going = eviction_order(held)
    if not going:
        return None
    first = going[0]
    if first.can_spill:
        return first.conversation, Relief.SPILL
    if first.can_quantise:
        return first.conversation, Relief.QUANTISE
    return first.conversation, Relief.DROP
