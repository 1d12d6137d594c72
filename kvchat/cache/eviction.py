"""What to drop when the context is full, decided in integers (and for scores one float per token).

A policy is one small class: it sees where a conversation's turns begin and how many tokens may stay, and
answers with one kept set for all layers and heads. It knows no tensors and no text.

`Turns` is exact: what stays is read again, as if the dropped turns had never been. The others leave a gap:
what stays was computed with the dropped tokens in sight, so their influence stays, and later tokens can't
look back at them. Dropping keys and values is not forgetting.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol

SINKS = 4
"""Tokens at the very start that attention leans on whatever they say (StreamingLLM, section 3.1)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A conversation as a policy sees it; every number counts tokens from the start."""

    tokens: int
    system_end: int
    """Where the system prompt, and the template's own words around it, end."""
    turns: tuple[int, ...]
    """Where each turn (a question and its answer) begins; ascending, the last one is under way."""
    edges: Sequence[int] = ()
    """Where blocks begin whose tokens go together, ending with `tokens`; empty for single tokens."""
    scores: Sequence[float] = ()
    """How much the latest queries attend to each token."""


class Policy(Protocol):
    """What stays when the context is full."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    """The paper or document of the method."""
    leaves_gap: ClassVar[bool]
    """Whether the kept tokens stay as they are, with a gap; else they are read again and exact."""
    needs_scores: ClassVar[bool]

    def keep(self, layout: Layout, target: int) -> list[range]:
        """The tokens that stay:

        at most `target` of them, unless what is safe is more; all where none can go.
        """
        ...


class Nothing:
    """Drops nothing: a full context ends the answer and refuses the next one."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "refuse when the context is full"
    source: ClassVar[str] = ""
    leaves_gap: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def keep(self, layout: Layout, target: int) -> list[range]:
        """Everything."""
        return [range(layout.tokens)]


class Turns:
    """Drops the oldest whole turns; never the system prompt, never the turn under way."""

    name: ClassVar[str] = "turns"
    summary: ClassVar[str] = "drop the oldest turns and read what stays again: exact"
    source: ClassVar[str] = "the usual truncation of chat servers, with the survivors read again"
    leaves_gap: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def keep(self, layout: Layout, target: int) -> list[range]:
        """The system prompt and the longest run of latest turns that fits."""
        fitting = (t for t in layout.turns if layout.system_end + layout.tokens - t <= target)
        start = next(fitting, layout.turns[-1] if layout.turns else layout.system_end)
        return _ranges(layout.tokens, [range(layout.system_end), range(start, layout.tokens)])


class Sinks:
    """Keeps the first tokens and a window of the latest ones."""

    name: ClassVar[str] = "sinks"
    summary: ClassVar[str] = (
        f"keep {SINKS} sinks and the latest tokens, with a gap: approximate, costs nothing"
    )
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    leaves_gap: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False

    def keep(self, layout: Layout, target: int) -> list[range]:
        """At least `SINKS` tokens at the start, and as many of the end as fit; the last one always."""
        head = _block_end(layout, SINKS)
        fitting = _block_end(layout, max(head, layout.tokens - max(1, target - head)))
        tail = max(head, min(fitting, _block_start(layout, layout.tokens - 1)))
        return _ranges(layout.tokens, [range(head), range(tail, layout.tokens)])


class SnapKV:
    """Keeps what the latest queries attend to, besides the sinks and the turn under way."""

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = (
        "keep what the latest question attends to, with gaps: approximate, costs a short read"
    )
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469 (one kept set for all heads and layers)"
    leaves_gap: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    def keep(self, layout: Layout, target: int) -> list[range]:
        """Sinks and the last turn, then the best blocks in between until `target` is reached.

        The latest token stays also where the last turn is yet to be read: positions go on from it.
        """
        head = _block_end(layout, SINKS)
        last = min((*layout.turns[-1:], layout.tokens - 1))
        tail = max(head, _block_start(layout, max(0, last)))
        middle = _blocks(layout, head, tail)
        middle.sort(key=lambda block: max(layout.scores[i] for i in block), reverse=True)
        room, kept = target - head - (layout.tokens - tail), []
        for block in middle:
            if len(block) > room:
                break
            kept.append(block)
            room -= len(block)
        return _ranges(
            layout.tokens, [range(head), *sorted(kept, key=lambda b: b.start), range(tail, layout.tokens)]
        )


POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Nothing(), Turns(), Sinks(), SnapKV())}


def dropped(tokens: int, kept: Sequence[range]) -> list[range]:
    """What lies between and around the kept ranges."""
    starts = [0, *(r.stop for r in kept)]
    ends = [*(r.start for r in kept), tokens]
    return [range(a, b) for a, b in zip(starts, ends, strict=True) if a < b]


def turns_in(layout: Layout, ranges: Sequence[range]) -> int:
    """How many turns lose all of their tokens in `ranges`."""
    turns = [range(a, b) for a, b in pairwise((*layout.turns, layout.tokens))]
    return sum(any(r.start <= t.start and t.stop <= r.stop for r in ranges) for t in turns)


def _block_end(layout: Layout, token: int) -> int:
    """The first block edge at or after `token`."""
    token = min(token, layout.tokens)
    return layout.edges[bisect_left(layout.edges, token)] if layout.edges else token


def _block_start(layout: Layout, token: int) -> int:
    """The last block edge at or before `token`."""
    return layout.edges[bisect_right(layout.edges, token) - 1] if layout.edges else token


def _blocks(layout: Layout, start: int, end: int) -> list[range]:
    edges = [e for e in layout.edges if start <= e <= end] if layout.edges else list(range(start, end + 1))
    return [range(a, b) for a, b in pairwise(edges)]


def _ranges(tokens: int, ranges: Sequence[range]) -> list[range]:
    """Joined where they touch; empty ones left out."""
    joined: list[range] = []
    for each in ranges:
        if not each:
            continue
        if joined and joined[-1].stop >= each.start:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, each.stop))
        else:
            joined.append(each)
    return joined
