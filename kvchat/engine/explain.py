"""Why less was reused than the history: words for the user, found by comparing messages.

It knows roles and texts; it refuses to know tensors and token ids.
"""

from collections.abc import Sequence

from kvchat.contract import CacheMode, PromptMessage

CACHE_IS_OFF = "the cache is off: every token reads everything again"
CACHE_PER_TURN = "the cache is thrown away after each turn"
CACHE_WAS_OFF = "the cache was off in the last turn"
CACHE_WAS_PER_TURN = "the cache was thrown away after the last turn"
NOT_READ_YET = "not read since the engine started"
TEMPLATE_REWROTE = "the chat template writes earlier messages differently now"

WHEN_DISCARDED = {CacheMode.OFF: CACHE_WAS_OFF, CacheMode.TURN: CACHE_WAS_PER_TURN}
NEVER_KEPT = {CacheMode.OFF: CACHE_IS_OFF, CacheMode.TURN: CACHE_PER_TURN}


def has_history(messages: Sequence[PromptMessage]) -> bool:
    """Whether anything was answered before."""
    return any(message.role == "assistant" for message in messages)


def explain_difference(before: Sequence[PromptMessage], now: Sequence[PromptMessage]) -> str:
    """What changed between the conversation that was read and the one to be read now."""
    if _system(before) != _system(now):
        return "system prompt edited"
    pairs = zip(_spoken(before), _spoken(now), strict=False)
    for number, (old, new) in enumerate(pairs, start=1):
        if (old.role, old.text) != (new.role, new.text):
            return f"message {number} edited"
    return TEMPLATE_REWROTE


def _system(messages: Sequence[PromptMessage]) -> str:
    return next((m.text for m in messages if m.role == "system"), "")


def _spoken(messages: Sequence[PromptMessage]) -> list[PromptMessage]:
    return [m for m in messages if m.role != "system"]
