"""The same prompt with the KV cache and without it: what was measured of each run, and what that says.

Plain values made of events and figures. Must not depend on widgets or engines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvchat.chat.wording import tokens
from kvchat.contract import (
    CacheMode,
    FinishReason,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    TurnStats,
)
from kvchat.text import one_line
from kvchat.ui.formatting import visible

UNCACHED_TOKENS = 32
"""Of the answer without a cache: every one of them reads the whole conversation again."""
WITH, WITHOUT = "●", "○"
"""Of the two runs, in the plot and over the columns."""
SHOWN_CHARACTERS = 24
"""Of each text from where they part."""


@dataclass(slots=True)
class Lane:
    """One of the two runs, as far as it is."""

    request: TurnRequest | None = None
    started: TurnStarted | None = None
    stats: TurnStats | None = None
    failure: str = ""
    ids: list[int] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    """Seconds of each token; the first one's is the prefill."""
    pieces: list[tuple[float, str]] = field(default_factory=list)
    """(seconds since the reading began, text that was there then)."""

    @property
    def over(self) -> bool:
        """Whether it ended, well or not."""
        return self.stats is not None or bool(self.failure)

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(text for _, text in self.pieces)

    @property
    def ms(self) -> list[float]:
        """Milliseconds of each token after the first one."""
        return [1000 * step for step in self.step_s[1:]]

    @property
    def seconds(self) -> float:
        """Until the last token, by the engine's clock."""
        return sum(self.step_s)

    def hear(self, event: TurnEvent) -> None:
        """Takes an event of this run."""
        match event:
            case TurnStarted():
                self.started = event
            case Tokens():
                self.ids.extend(event.token_ids)
                self.step_s.extend(event.step_s)
                self.pieces.append((self.seconds, event.text))
            case TurnFinished():
                self.stats = event.stats
            case TurnFailed():
                self.failure = event.reason

    def text_at(self, seconds: float) -> str:
        """What was written by then."""
        return "".join(text for at, text in self.pieces if at <= seconds)

    def steps_at(self, seconds: float) -> int:
        """Tokens after the first one that were written by then."""
        elapsed, count = 0.0, 0
        for step in self.step_s:
            elapsed += step
            count += elapsed <= seconds
        return max(0, count - 1)


def without_cache(request: TurnRequest, turn: str, conversation: str) -> TurnRequest:
    """The same prompt for a conversation that nobody keeps, and without a cache."""
    few = min(request.sampling.max_tokens, UNCACHED_TOKENS)
    return replace(
        request,
        turn=turn,
        conversation=conversation,
        mode=CacheMode.OFF,
        sampling=replace(request.sampling, max_tokens=few),
        persist=False,
    )


def parted_at(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index of the first token that differs; None where the shorter one is the beginning of the other."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)


def verdict(cached: Lane, uncached: Lane) -> list[str]:
    """What the two runs say, in sentences."""
    failed = [lane.failure for lane in (cached, uncached) if lane.failure]
    if failed:
        return [f"There is nothing to compare: {one_line(failed[0])}"]
    if not (cached.stats and uncached.stats):
        return []
    return [*speed_words(cached.stats, uncached.stats), text_words(cached, uncached)]


def speed_words(cached: TurnStats, uncached: TurnStats) -> list[str]:
    """How much sooner and faster; only where both sides were measured."""
    said = []
    if cached.ttft_s > 0 and uncached.ttft_s > 0:
        said.append(f"first text {times(uncached.ttft_s / cached.ttft_s, 'sooner', 'later')}")
    if cached.decode_tok_s > 0 and uncached.decode_tok_s > 0:
        said.append(f"decode {times(cached.decode_tok_s / uncached.decode_tok_s, 'faster', 'slower')}")
    read = (
        f"{tokens(cached.evaluated_tokens)} went through the model with the cache, "
        f"{uncached.evaluated_tokens:,} without it."
    )
    return [f"With the cache: {', '.join(said)}.", read] if said else [read]


def times(ratio: float, more: str, less: str) -> str:
    """`10.4× faster`, or the other way round."""
    return f"{ratio:,.1f}× {more}" if ratio >= 1 else f"{1 / ratio:,.1f}× {less}"


def text_words(cached: Lane, uncached: Lane) -> str:
    """Whether both wrote the same; where they don't, the place."""
    compared = min(len(cached.ids), len(uncached.ids))
    if not compared:
        return "One of them wrote nothing, so there is no text to compare."
    place = parted_at(cached.ids, uncached.ids)
    if place is None:
        return f"Both wrote the same in all {tokens(compared)} that can be compared."
    one, other = cached.text, uncached.text
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    shown = [visible(text[same : same + SHOWN_CHARACTERS]) for text in (one, other)]
    return (
        f"Up to token {place} both wrote the same; at token {place + 1} rounding parted them: "
        f"“{shown[0]}” with, “{shown[1]}” without. Two tokens were about as likely there."
    )


def lane_words(lane: Lane) -> str:
    """The figures of one run in one line."""
    if lane.failure:
        return one_line(lane.failure)
    if lane.started is None:
        return "waiting"
    parts = [f"reused {lane.started.reused_tokens:,}", f"read {lane.started.prefilled_tokens:,}"]
    stats = lane.stats
    if stats:
        parts += [f"TTFT {stats.ttft_s:.2f} s", f"{stats.decode_tok_s:.1f} tok/s"]
        parts += ["stopped"] * (stats.finish_reason == FinishReason.CANCELLED)
    elif lane.step_s:
        parts += [f"TTFT {lane.step_s[0]:.2f} s", f"token {len(lane.ids):,}"]
    return " · ".join(parts)


def plot(series: Sequence[tuple[str, Sequence[float]]], width: int, height: int) -> list[str]:
    """Milliseconds over tokens on a logarithmic scale: each series in its glyph, a later one over an earlier.

    Args:
        series: (glyph, values above 0).
        width: columns of the whole plot, its labels included.
        height: rows.
    """
    positive = [[(i, v) for i, v in enumerate(values) if v > 0] for _, values in series]
    every = [v for values in positive for _, v in values]
    label = 8
    columns = width - label - 1
    if not every or columns < 1 or height < 1:
        return [" " * max(0, width)] * max(0, height)
    low, high = math.log(min(every)), math.log(max(every))
    longest = max(len(values) for _, values in series)
    rows = [[" "] * columns for _ in range(height)]
    for (glyph, _), values in zip(series, positive, strict=True):
        for index, value in values:
            x = index * (columns - 1) // max(1, longest - 1) if longest > columns else index
            share = (math.log(value) - low) / (high - low) if high > low else 0.0
            rows[height - 1 - round(share * (height - 1))][x] = glyph
    labels = [""] * height
    labels[-1] = ms_label(min(every))
    labels[0] = ms_label(max(every))
    return [f"{text:>{label}}┤{''.join(row)}" for text, row in zip(labels, rows, strict=True)]


def ms_label(ms: float) -> str:
    """`7.8 ms`, `1,204 ms`."""
    return f"{ms:,.{0 if ms >= 100 else 1}f} ms"
