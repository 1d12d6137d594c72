"""Events of a turn become figures for the panel. Plain values in, plain values out; no widgets."""

import time
from dataclasses import replace

from kvchat.chat.conversation import Conversation
from kvchat.contract import (
    CacheMode,
    Evicted,
    EvictionPolicy,
    Miss,
    ModelFacts,
    PoolState,
    PrefillProgress,
    Tokens,
    TurnFinished,
    TurnStarted,
    TurnStats,
    WarmCache,
)
from kvchat.ui.widgets.panel import ENOUGH_TOKENS, PanelState, TurnFigures

KEPT_STEPS = 64
"""Tokens whose milliseconds the sparkline remembers."""


class Figures:
    """Keeps the panel's state up to date."""

    def __init__(self) -> None:
        self.state = PanelState()
        self._asked_at = 0.0
        self._largest_prefill = 0
        self.last_miss: Miss | None = None

    def ready(self, model: ModelFacts, rss_bytes: int) -> None:
        """The engine is there."""
        self.state = replace(self.state, model=model, rss_bytes=rss_bytes)

    def lost(self) -> None:
        """The engine died, and with it every cache."""
        self.state = replace(self.state, rss_bytes=0, pool=None, others_bytes=0)
        self._change(kv_tokens=0, kv_bytes=0)

    def settings(self, mode: CacheMode, policy: EvictionPolicy) -> None:
        """Those of the open conversation."""
        self.state = replace(self.state, mode=mode, policy=policy)

    def opened(self, conversation: Conversation, warm: WarmCache | None) -> None:
        """Another conversation is shown: its last turn's figures from the file, and what of it is warm."""
        turns = [m.stats for m in conversation.messages if m.stats]
        by_mode = {stats.cache_mode: stats for stats in turns}
        figures = figures_of(turns[-1]) if turns else TurnFigures()
        held = (warm.tokens, warm.bytes) if warm else (0, 0)
        figures = replace(figures, kv_tokens=held[0], kv_bytes=held[1])
        self.last_miss = None
        for stats in turns:
            self._note_rate(stats)
        self.state = replace(
            self.state,
            turn=figures,
            step_ms=(),
            by_mode=by_mode,
            turns=tuple(turns),
        )

    def asked(self) -> None:
        """A turn begins."""
        self._asked_at = time.perf_counter()
        kept = self.state.turn
        self.state = replace(
            self.state, turn=TurnFigures(kv_tokens=kept.kv_tokens, kv_bytes=kept.kv_bytes), step_ms=()
        )

    def resumed(self, written: int) -> None:
        """The conversation of the turn under way is shown again; so many tokens are written already."""
        if written:
            self._asked_at = 0.0
        kept = self.state.turn
        self.state = replace(
            self.state,
            turn=TurnFigures(written=written, kv_tokens=kept.kv_tokens, kv_bytes=kept.kv_bytes),
            step_ms=(),
        )

    def started(self, event: TurnStarted) -> None:
        """What is reused and what has to be read is known."""
        self.last_miss = event.miss
        self._change(
            reused=event.reused_tokens,
            read=event.prefilled_tokens,
            restored=event.restored_tokens,
            reuse_note=event.reuse_note,
        )

    def evicted(self, event: Evicted) -> None:
        """Something was dropped because the context was full."""
        self._change(evicted=self.state.turn.evicted + event.tokens)

    def pool(self, pool: PoolState, conversation: str) -> None:
        """What all caches take; that of the open conversation may have changed between turns."""
        held = next((c for c in pool.caches if c.conversation == conversation), None)
        others = max(0, pool.used_bytes - (held.bytes if held else 0))
        self.state = replace(self.state, pool=pool, others_bytes=others)
        if not self.state.turn.reading:
            self._change(kv_tokens=held.tokens if held else 0, kv_bytes=held.bytes if held else 0)

    def prefilled(self, event: PrefillProgress) -> None:
        """A chunk of a long prompt was read."""
        elapsed = time.perf_counter() - self._asked_at
        left = elapsed / event.done * (event.total - event.done)
        reading = f"reading {event.done:,} of {event.total:,}, {left:.0f} s left" if left >= 0.5 else ""
        self._change(reading=reading)

    def tokens(self, event: Tokens) -> None:
        """Tokens were written."""
        turn = self.state.turn
        ttft = turn.ttft_s
        if ttft is None and event.text and self._asked_at:
            ttft = time.perf_counter() - self._asked_at
        steps = [step * 1000 for step in event.step_s]
        # the first step of a turn is its prefill, not a decode step
        fresh = steps[1:] if turn.written == 0 else steps
        step_ms = (*self.state.step_ms, *fresh)[-KEPT_STEPS:]
        decode = 1000 * len(step_ms) / sum(step_ms) if step_ms else None
        self.state = replace(self.state, step_ms=step_ms)
        self._change(
            written=turn.written + len(event.token_ids),
            ttft_s=ttft,
            decode_tok_s=decode,
            kv_tokens=event.kv_tokens,
            kv_bytes=event.kv_bytes,
            reading="",
        )

    def finished(self, event: TurnFinished) -> None:
        """The turn is over: measured figures replace what was counted on the way."""
        stats = event.stats
        self._note_rate(stats)
        self.state = replace(
            self.state,
            turn=figures_of(stats),
            rss_bytes=stats.rss_bytes,
            by_mode={**self.state.by_mode, stats.cache_mode: stats},
            turns=(*self.state.turns, stats),
        )

    def _note_rate(self, stats: TurnStats) -> None:
        """The prefill rate is that of the largest prefill that was long enough."""
        if stats.prefilled_tokens >= max(ENOUGH_TOKENS, self._largest_prefill) and stats.prefill_tok_s:
            self._largest_prefill = stats.prefilled_tokens
            self.state = replace(self.state, prefill_rate=stats.prefill_tok_s)

    def _change(self, **changes: object) -> None:
        self.state = replace(self.state, turn=replace(self.state.turn, **changes))  # type: ignore[arg-type]


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
