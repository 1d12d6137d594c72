"""The context is full: carries out what an eviction policy decides.

Two ways. Leaving out whole messages changes the prompt, and the one rule of every turn does the rest.
Leaving a gap changes the cache: rows go, positions stay, until the model's positions end and the gaps are
closed.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from kvchat.cache.eviction import POLICIES, Layout, dropped
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.rope_shift import can_close_gaps, close_gaps
from kvchat.contract import PromptMessage
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.prompt import Rendered
from kvchat.engine.snapkv import attention_scores, scoring_window

SHRUNK_TO = 0.75
"""Share of the context that is left after turns were dropped: the next turns fit without another eviction."""
GAP_SHRUNK_TO = 0.5
"""The same for policies that leave a gap: half, so that a key is turned to another position only once."""


@dataclass(frozen=True, slots=True)
class Room:
    """What an eviction did to the rows of a cache."""

    tokens: int
    """Rows dropped."""
    reread: int
    """Rows read again: to score them, or because positions ended."""
    note: str


def without_oldest(messages: Sequence[PromptMessage], count: int) -> tuple[PromptMessage, ...]:
    """The messages without the `count` oldest ones that are not the system prompt."""
    system = [m for m in messages[:1] if m.role == "system"]
    return (*system, *messages[len(system) + count :])


def layout_of(messages: Sequence[PromptMessage], rendered: Rendered) -> Layout:
    """The prompt as a policy sees it: a turn begins where the message before its question ended."""
    system = messages[0].role == "system"
    begins = [i for i, m in enumerate(messages) if m.role == "user"]
    turns = tuple(rendered.ends[i - 1] if i else 0 for i in begins)
    return Layout(len(rendered.ids), rendered.ends[0] if system else 0, turns)


def messages_to_drop(messages: Sequence[PromptMessage], rendered: Rendered, target: int) -> int:
    """How many of the oldest messages `turns` leaves out; 0 where only the turn under way is left."""
    layout = layout_of(messages, rendered)
    gone = dropped(layout.tokens, POLICIES["turns"].keep(layout, target))
    end = gone[-1].stop if gone else 0
    system = messages[0].role == "system"
    return sum(1 for e in rendered.ends[system:] if e <= end)


def rows_layout(kv: ConversationKV, prompt: Layout, scores: Sequence[float] = ()) -> Layout:
    """The rows of a cache that was read from this prompt, and from the answer after it."""
    rows = kv.rows
    begins = {bisect_left(rows, turn) for turn in prompt.turns}
    system_end = bisect_left(rows, prompt.system_end)
    return Layout(len(rows), system_end, tuple(sorted(begins)), kv.edges, scores)


def evict_rows(loaded: LoadedModel, kv: ConversationKV, policy: str, prompt: Layout, limit: int) -> Room:
    """Drops rows until at most half of `limit` is filled, or what is safe.

    Raises:
        KvchatError: the policy can't score this model's tokens.
    """
    chosen = POLICIES[policy]
    reread = scoring_window(kv) if chosen.needs_scores else 0
    scores = attention_scores(loaded.model, kv) if chosen.needs_scores else ()
    kept = chosen.keep(rows_layout(kv, prompt, scores), int(limit * GAP_SHRUNK_TO))
    before = len(kv)
    if gone := dropped(before, kept):
        kv.select([row for r in kept for row in r])
    tokens = sum(len(r) for r in gone)
    spans = ", ".join(f"{r.start:,}-{r.stop - 1:,}" for r in gone[:3]) + (" …" if len(gone) > 3 else "")
    note = f"{policy}: rows {spans} dropped, positions kept; approximate" if gone else ""
    return Room(tokens, reread, note)


def keep_positions(loaded: LoadedModel, kv: ConversationKV, tokens: int) -> Room | None:
    """Closes the gaps where the next `tokens` would pass the model's last position; None if they don't."""
    if kv.next_position + tokens <= loaded.shape.position_limit or not kv.has_gap:
        return None
    frequencies = loaded.rotary_frequencies()
    if frequencies is not None and can_close_gaps(kv):
        close_gaps(kv, frequencies, interleaved=loaded.shape.rotary == "interleaved")
        return Room(0, 0, "positions closed up: every kept key was turned once, in fp32")
    history, rows = kv.ids, kv.rows
    kv.clear()
    loaded.reader(kv).read([history[row] for row in rows])
    kv.restart(history, rows)
    return Room(0, len(rows), f"positions ended: the {len(rows):,} kept tokens were read again, exactly")
