"""Why tokens have to be read again: words for the user, found by comparing what was read with what is asked.

It knows roles, texts, token ids and where each message ends; it refuses to know tensors.
"""

from collections.abc import Callable, Sequence

from kvchat.cache.prefix import common_prefix
from kvchat.contract import CacheMode, Miss, PromptMessage
from kvchat.engine.prompt import Rendered

CACHE_IS_OFF = "the cache is off: every token reads everything again"
CACHE_PER_TURN = "the cache is thrown away after each turn"
CACHE_WAS_OFF = "the cache was off in the last turn"
CACHE_WAS_PER_TURN = "the cache was thrown away after the last turn"
NOT_READ_YET = "not read since the engine started"
CHANGED_SINCE_SAVED = "the conversation was changed after its cache was saved"
NOT_CACHED = "what follows was not kept: its reading was stopped, or it was answered without a cache"
TEMPLATE_REWROTE = "the chat template writes earlier messages differently now"
REASONING_DROPPED = "the chat template dropped the reasoning of an earlier answer"
ANOTHER_TOKENIZER = "the model changed: its tokenizer reads the conversation as other tokens"
TURNS_LEFT_OUT = "older turns were left out because the context was full"
BEFORE_A_GAP = "tokens were evicted around there: what follows is read again"
NOT_A_NUMBER = "what the last turn read held values that are no numbers"
FAILED_AFTER_EVICTION = "the last turn failed after it had evicted tokens"
BEFORE_A_CHECKPOINT = "recurrent layers go back to the last turn's end only"

WHEN_DISCARDED = {CacheMode.OFF: CACHE_WAS_OFF, CacheMode.TURN: CACHE_WAS_PER_TURN}
NEVER_CACHED = {CacheMode.OFF: CACHE_IS_OFF, CacheMode.TURN: CACHE_PER_TURN}

SHOWN_TOKENS = 6
"""Of each side of a difference."""
SHOWN_BEFORE = 12
"""Tokens before a difference, to show where that is."""

Decode = Callable[[Sequence[int]], str]


def has_history(messages: Sequence[PromptMessage]) -> bool:
    """Whether anything was answered before."""
    return any(message.role == "assistant" for message in messages)


def read_before(rendered: Rendered) -> int:
    """Tokens of the prompt that belong to the messages before the last one."""
    return rendered.ends[-2] if len(rendered.ends) > 1 else 0


def explain_difference(
    before: Sequence[PromptMessage], now: Sequence[PromptMessage], evicted_messages: int = 0
) -> str:
    """What changed between the conversation that was read and the one to be read now.

    Args:
        evicted_messages: messages before these, which count too when one is named by its number.
    """
    if _system(before) != _system(now):
        return "system prompt edited"
    spoken, asked = _spoken(before), _spoken(now)
    for number, (old, new) in enumerate(zip(spoken, asked, strict=False), start=evicted_messages + 1):
        if (old.role, old.text) != (new.role, new.text):
            return f"message {number} edited"
    if any(m.role == "assistant" and "</think>" in m.text for m in spoken):
        return REASONING_DROPPED
    if any(old.tokenizer != new.tokenizer for old, new in zip(spoken, asked, strict=False)):
        return ANOTHER_TOKENIZER
    return TEMPLATE_REWROTE


def difference_at(cached: Sequence[int], rendered: Rendered, decode: Decode) -> tuple[int, int, str, str]:
    """(index of the first token that differs, its message, the cached and the prompt's text there)."""
    token = common_prefix(cached, rendered.ids)
    message = sum(end <= token for end in rendered.ends)
    was, now = (decode(list(ids[token : token + SHOWN_TOKENS])) for ids in (cached, rendered.ids))
    return token, message, was, now


def text_before(rendered: Rendered, token: int, decode: Decode) -> str:
    """What stands right before a token of the prompt."""
    return decode(list(rendered.ids[max(0, token - SHOWN_BEFORE) : token]))


def sentence(miss: Miss) -> str:
    """The miss and its price, in one sentence."""
    price = f"{miss.tokens:,} tokens to read again"
    if miss.seconds is not None and miss.tokens:
        price += f", about {miss.seconds:.1f} s at your measured {miss.tokens / miss.seconds:,.0f} tok/s"
    where = f"; first difference: {miss.was!r} → {miss.now!r}" if miss.was or miss.now else ""
    return f"{miss.cause} ({price}{where})"


def _system(messages: Sequence[PromptMessage]) -> str:
    return next((m.text for m in messages if m.role == "system"), "")


def _spoken(messages: Sequence[PromptMessage]) -> list[PromptMessage]:
    return [m for m in messages if m.role != "system"]
