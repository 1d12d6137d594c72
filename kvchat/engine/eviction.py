"""Applies an eviction policy when the context is full.

Evicting whole messages changes the prompt; the turn then reuses and reads as usual. Evicting rows changes the
cache: the other rows keep their positions, until the model's position limit is reached and the gaps are
closed.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from kvchat.cache.eviction import POLICIES, ContextLayout, evicted
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.rope_shift import can_close_gaps, close_gaps
from kvchat.cache.token_index import TokenIndex
from kvchat.contract import EvictionPolicy, PromptMessage
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.prompt import Rendered
from kvchat.engine.snapkv import attention_scores, scoring_window

SHRUNK_TO = 0.75
"""Share of the context that stays when turns are evicted, so that the next turns fit without another one."""
GAP_SHRUNK_TO = 0.5
"""The same for policies that leave a gap: half, so that a key is rotated to another position only once."""


@dataclass(frozen=True, slots=True)
class EvictedRows:
    """What an eviction did to the rows of a cache."""

    tokens: int
    """Rows evicted."""
    reread: int
    """Rows read again: to score them, or because the position limit was reached."""
    note: str


def leaves_gap(policy: EvictionPolicy) -> bool:
    """Whether the policy evicts single rows instead of whole messages."""
    return POLICIES[policy.value].leaves_gap


def without_oldest(messages: Sequence[PromptMessage], count: int) -> tuple[PromptMessage, ...]:
    """The messages without the `count` oldest ones; the system prompt stays and does not count."""
    system = [m for m in messages[:1] if m.role == "system"]
    return (*system, *messages[len(system) + count :])


def layout_of(messages: Sequence[PromptMessage], rendered: Rendered) -> ContextLayout:
    """The layout of a prompt; a turn begins where the message before its question ended."""
    system = messages[0].role == "system"
    begins = [i for i, m in enumerate(messages) if m.role == "user"]
    turns = tuple(rendered.ends[i - 1] if i else 0 for i in begins)
    return ContextLayout(len(rendered.ids), rendered.ends[0] if system else 0, turns)


def messages_to_evict(messages: Sequence[PromptMessage], rendered: Rendered, target: int) -> int:
    """How many of the oldest messages `turns` evicts; 0 where only the current turn is left."""
    layout = layout_of(messages, rendered)
    ranges = evicted(layout.tokens, POLICIES["turns"].keep(layout, target))
    end = ranges[-1].stop if ranges else 0
    system = messages[0].role == "system"
    return sum(1 for e in rendered.ends[system:] if e <= end)


def rows_layout(kv: ConversationKV, prompt: ContextLayout, scores: Sequence[float] = ()) -> ContextLayout:
    """The layout of a cache's rows, which were read from this prompt and the answer to it."""
    rows = kv.rows
    begins = {bisect_left(rows, turn) for turn in prompt.turns}
    system_end = bisect_left(rows, prompt.system_end)
    return ContextLayout(len(rows), system_end, tuple(sorted(begins)), kv.edges, scores)


def evict_rows(
    loaded: LoadedModel, kv: ConversationKV, policy: str, prompt: ContextLayout, limit: int
) -> EvictedRows:
    """Evicts rows until at most half of `limit` is filled, or nothing more may be evicted.

    Raises:
        KvchatError: the policy can't score this model's tokens.
    """
    chosen = POLICIES[policy]
    reread = scoring_window(kv) if chosen.needs_scores else 0
    scores = attention_scores(loaded.model, kv) if chosen.needs_scores else ()
    remaining = chosen.keep(rows_layout(kv, prompt, scores), int(limit * GAP_SHRUNK_TO))
    if ranges := evicted(len(kv), remaining):
        kv.select([row for r in remaining for row in r])
    tokens = sum(len(r) for r in ranges)
    spans = ", ".join(f"{r.start:,}-{r.stop - 1:,}" for r in ranges[:3]) + (" …" if len(ranges) > 3 else "")
    note = f"{policy}: rows {spans} evicted, positions unchanged; approximate" if ranges else ""
    return EvictedRows(tokens, reread, note)


def close_position_gaps(loaded: LoadedModel, kv: ConversationKV, tokens: int) -> EvictedRows | None:
    """Closes the gaps where the next `tokens` would exceed the model's position limit; else None."""
    if kv.index.next_position + tokens <= loaded.shape.position_limit or not kv.index.has_gap:
        return None
    frequencies = loaded.rotary_frequencies()
    if frequencies is not None and can_close_gaps(kv):
        close_gaps(kv, frequencies, interleaved=loaded.shape.rotary == "interleaved")
        return EvictedRows(0, 0, "position gaps closed: every remaining key was rotated once, in fp32")
    history, rows = kv.ids, kv.rows
    kv.clear()
    loaded.reader(kv).read([history[row] for row in rows])
    kv.reindex(TokenIndex(history, rows, kv.positions))
    note = f"position limit reached: the {len(rows):,} remaining tokens were read again: exact"
    return EvictedRows(0, len(rows), note)
