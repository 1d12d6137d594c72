"""Why tokens have to be read again, in words for the user.

Compares the tokens and messages of a cache with those of the prompt. Must not import tensors.
"""

from collections.abc import Callable, Sequence

from kvchat.cache.prefix import common_prefix
from kvchat.contract import CacheMode, Miss, PromptMessage, TurnRequest
from kvchat.engine.cache_manager import Caches, ResidentCache
from kvchat.engine.cache_source import Reuse
from kvchat.engine.disk_tier import SavedCache
from kvchat.engine.eviction import leaves_gap
from kvchat.engine.prefill_rate import PrefillRate
from kvchat.engine.prompt import Rendered
from kvchat.engine.prompt_fitting import FittedPrompt

CACHE_IS_OFF = "the cache is off: every token reads everything again"
CACHE_PER_TURN = "the cache is dropped after each turn"
CACHE_WAS_OFF = "the cache was off in the last turn"
CACHE_WAS_PER_TURN = "the cache was dropped after the last turn"
NOT_READ_YET = "not read since the engine started"
CHANGED_SINCE_SAVED = "the conversation was changed after its cache was saved"
NOT_CACHED = "what follows is not in the cache: the read was stopped, or a turn ran without the cache"
TEMPLATE_REWROTE = "the chat template renders earlier messages differently now"
REASONING_DROPPED = "the chat template dropped the reasoning of an earlier answer"
ANOTHER_TOKENIZER = "the model changed: its tokenizer gives other tokens"
TURNS_EVICTED = "older turns were evicted because the context was full"
BEFORE_A_GAP = "tokens were evicted there: what follows is read again"
NOT_A_NUMBER = "the last turn computed NaN (not a number)"
FAILED_AFTER_EVICTION = "the last turn failed after it had evicted tokens"
BEFORE_A_CHECKPOINT = "recurrent layers can only return to the end of the last turn"

WHEN_DISCARDED = {CacheMode.OFF: CACHE_WAS_OFF, CacheMode.TURN: CACHE_WAS_PER_TURN}
NEVER_CACHED = {CacheMode.OFF: CACHE_IS_OFF, CacheMode.TURN: CACHE_PER_TURN}

SHOWN_TOKENS = 6
"""Tokens shown of each side of a difference."""
SHOWN_BEFORE = 12
"""Tokens shown before a difference."""

Decode = Callable[[Sequence[int]], str]


def has_history(messages: Sequence[PromptMessage]) -> bool:
    """Whether there is an earlier answer."""
    return any(message.role == "assistant" for message in messages)


def read_before(rendered: Rendered) -> int:
    """Tokens of the prompt that belong to the messages before the last one."""
    return rendered.ends[-2] if len(rendered.ends) > 1 else 0


def explain_miss(
    request: TurnRequest,
    prompt: FittedPrompt,
    reuse: Reuse,
    caches: Caches,
    rate: PrefillRate,
    decode: Decode,
) -> Miss | None:
    """Why tokens of earlier messages are read again; None where none are."""
    messages, rendered = prompt.messages, prompt.rendered
    # the id that was sampled last was never read: reading it now is no miss
    again = read_before(rendered) - reuse.tokens - 1
    if again <= 0 or request.mode is not CacheMode.ON or not has_history(messages):
        return None
    seconds = rate.seconds(again)
    own = caches.get(request.conversation)
    saved = reuse.source if isinstance(reuse.source, SavedCache) else None
    if saved:
        cached: Sequence[int] = saved.chain.ids
    elif own and own.kv and not own.prefix_only and not reuse.refused:
        cached = own.kv.ids
    else:
        dropped = caches.drop_reasons.get(request.conversation, "")
        return Miss(reuse.refused or dropped or NOT_READ_YET, again, seconds)
    token, message, was, now = difference_at(cached, rendered, decode)
    if message < len(messages) and messages[0].role != "system":
        message += 1
    message += prompt.evicted_messages if message else 0
    if own and not saved:
        cause = _cause(request, prompt, own, token)
    else:
        cause = CHANGED_SINCE_SAVED if token < len(cached) else NOT_CACHED
    before = text_before(rendered, token, decode)
    return Miss(cause, again, seconds, token, was, now, message, before)


def _cause(request: TurnRequest, prompt: FittedPrompt, own: ResidentCache, token: int) -> str:
    """Why the resident cache differs from the prompt at `token`."""
    kv = own.kv
    if prompt.evicted_messages != own.evicted_messages:
        return TURNS_EVICTED
    if kv.index.has_gap and (token <= kv.index.last_gap_end or not leaves_gap(request.policy)):
        return BEFORE_A_GAP
    if kv.states and token >= len(kv.ids):
        return BEFORE_A_CHECKPOINT
    if token >= len(kv.ids):
        return NOT_CACHED
    if not own.messages:  # it was restored from disk, where no texts are saved
        return CHANGED_SINCE_SAVED
    return explain_difference(own.messages, prompt.messages, prompt.evicted_messages)


def explain_difference(
    before: Sequence[PromptMessage], now: Sequence[PromptMessage], evicted_messages: int = 0
) -> str:
    """What changed between the messages that were read and those to be read now.

    Args:
        evicted_messages: how many messages come before these, for numbering.
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
    """The text right before a token of the prompt."""
    return decode(list(rendered.ids[max(0, token - SHOWN_BEFORE) : token]))


def sentence(miss: Miss) -> str:
    """The miss and its cost, in one sentence."""
    cost = f"{miss.tokens:,} tokens to read again"
    if miss.seconds is not None and miss.tokens:
        cost += f", about {miss.seconds:.1f} s at your measured {miss.tokens / miss.seconds:,.0f} tok/s"
    where = f"; first difference: {miss.was!r} → {miss.now!r}" if miss.was or miss.now else ""
    return f"{miss.cause} ({cost}{where})"


def _system(messages: Sequence[PromptMessage]) -> str:
    return next((m.text for m in messages if m.role == "system"), "")


def _spoken(messages: Sequence[PromptMessage]) -> list[PromptMessage]:
    return [m for m in messages if m.role != "system"]
