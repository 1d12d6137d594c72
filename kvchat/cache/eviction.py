"""Which tokens to evict when the context is full.

A policy gets the layout of the context and how many tokens may stay, and returns the ranges that stay, the
same for all layers and heads. Must not import tensors.

`OldestTurns` is exact: the rest is read again without the evicted turns. The others leave a gap: the
remaining keys and values were computed with the evicted tokens in view and stay influenced by them, while
later tokens can't attend to them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol

SINKS = 4
"""Attention sinks: tokens at the start that always get much attention (StreamingLLM, section 3.1)."""


@dataclass(frozen=True, slots=True)
class ContextLayout:
    """The parts of a context, as token offsets from its start."""

    tokens: int
    system_end: int
    """End of the system prompt and of the template text around it."""
    turns: tuple[int, ...]
    """Start of each turn (a question and its answer); ascending, the last one is the current turn."""
    edges: Sequence[int] = ()
    """Starts of blocks that are evicted as a whole, then `tokens`; empty for single tokens."""
    scores: Sequence[float] = ()
    """How much the latest queries attend to each token."""


class Policy(Protocol):
    """An eviction policy."""

    name: ClassVar[str]
    leaves_gap: ClassVar[bool]
    """Whether single rows are evicted, which leaves a gap; else the rest is read again and exact."""
    needs_scores: ClassVar[bool]

    def keep(self, layout: ContextLayout, target: int) -> list[range]:
        """The tokens that stay: at most `target`, or those that the policy never evicts if they are more."""
        ...


class NoEviction:
    """Evicts nothing: a full context ends the answer and refuses the next one."""

    name: ClassVar[str] = "none"
    leaves_gap: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def keep(self, layout: ContextLayout, target: int) -> list[range]:
        """Everything."""
        return [range(layout.tokens)]


class OldestTurns:
    """Evicts the oldest whole turns; never the system prompt or the current turn."""

    name: ClassVar[str] = "turns"
    leaves_gap: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def keep(self, layout: ContextLayout, target: int) -> list[range]:
        """The system prompt and the longest run of latest turns that fits."""
        fitting = (t for t in layout.turns if layout.system_end + layout.tokens - t <= target)
        start = next(fitting, layout.turns[-1] if layout.turns else layout.system_end)
        return _ranges([range(layout.system_end), range(start, layout.tokens)])


class Sinks:
    """Keeps the first tokens and a window of the latest ones (StreamingLLM, arXiv 2309.17453)."""

    name: ClassVar[str] = "sinks"
    leaves_gap: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False

    def keep(self, layout: ContextLayout, target: int) -> list[range]:
        """At least `SINKS` tokens at the start, and as many at the end as fit; always the last one."""
        head = _block_end(layout, SINKS)
        fitting = _block_end(layout, max(head, layout.tokens - max(1, target - head)))
        tail = max(head, min(fitting, _block_start(layout, layout.tokens - 1)))
        return _ranges([range(head), range(tail, layout.tokens)])


class SnapKV:
    """Keeps the tokens that the latest queries attend to most, the sinks and the current turn.

    Source: SnapKV, arXiv 2404.14469, with one set of tokens for all heads and layers.
    """

    name: ClassVar[str] = "snapkv"
    leaves_gap: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    def keep(self, layout: ContextLayout, target: int) -> list[range]:
        """Sinks and the last turn, then the highest-scored blocks in between until `target` is reached.

        Always keeps the latest token, even where the last turn is not read yet: positions continue from it.
        """
        head = _block_end(layout, SINKS)
        last = min((*layout.turns[-1:], layout.tokens - 1))
        tail = max(head, _block_start(layout, max(0, last)))
        middle = _blocks(layout, head, tail)
        middle.sort(key=lambda block: max(layout.scores[i] for i in block), reverse=True)
        left, chosen = target - head - (layout.tokens - tail), []
        for block in middle:
            if len(block) > left:
                break
            chosen.append(block)
            left -= len(block)
        chosen.sort(key=lambda block: block.start)
        return _ranges([range(head), *chosen, range(tail, layout.tokens)])


POLICIES: dict[str, Policy] = {
    policy.name: policy for policy in (NoEviction(), OldestTurns(), Sinks(), SnapKV())
}


def evicted(tokens: int, remaining: Sequence[range]) -> list[range]:
    """The ranges of `tokens` that are not in `remaining`."""
    starts = [0, *(r.stop for r in remaining)]
    ends = [*(r.start for r in remaining), tokens]
    return [range(a, b) for a, b in zip(starts, ends, strict=True) if a < b]


def turns_in(layout: ContextLayout, ranges: Sequence[range]) -> int:
    """How many turns lie completely in `ranges`."""
    turns = [range(a, b) for a, b in pairwise((*layout.turns, layout.tokens))]
    return sum(any(r.start <= t.start and t.stop <= r.stop for r in ranges) for t in turns)


def _block_end(layout: ContextLayout, token: int) -> int:
    """The first block edge at or after `token`."""
    token = min(token, layout.tokens)
    return layout.edges[bisect_left(layout.edges, token)] if layout.edges else token


def _block_start(layout: ContextLayout, token: int) -> int:
    """The last block edge at or before `token`."""
    return layout.edges[bisect_right(layout.edges, token) - 1] if layout.edges else token


def _blocks(layout: ContextLayout, start: int, end: int) -> list[range]:
    edges = [e for e in layout.edges if start <= e <= end] if layout.edges else list(range(start, end + 1))
    return [range(a, b) for a, b in pairwise(edges)]


def _ranges(ranges: Sequence[range]) -> list[range]:
    """Merges ranges that touch, without empty ones."""
    joined: list[range] = []
    for each in ranges:
        if not each:
            continue
        if joined and joined[-1].stop >= each.start:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, each.stop))
        else:
            joined.append(each)
    return joined
