"""Renders a conversation so that it fits the context: evicts its oldest messages where the policy allows."""

from collections.abc import Sequence
from typing import NamedTuple

from kvchat.cache.eviction import POLICIES, SINKS
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import GROWTH_STEP, rounded_up
from kvchat.contract import CacheMode, EvictionPolicy, ModelFacts, PromptMessage, TurnRequest
from kvchat.engine.cache_manager import Caches
from kvchat.engine.eviction import SHRUNK_TO, layout_of, leaves_gap, messages_to_evict, without_oldest
from kvchat.engine.prompt import Rendered, Renderer
from kvchat.errors import KvchatError


class FittedPrompt(NamedTuple):
    """A rendered prompt that fits."""

    messages: tuple[PromptMessage, ...]
    """Those that are not evicted."""
    rendered: Rendered
    evicted_messages: int
    """The oldest messages without the system prompt, evicted in earlier turns or this one."""
    evicted_tokens: int
    """Tokens of the messages evicted in this turn."""
    limit: int
    """Tokens that fit: the model's context, or what the KV budget can store."""


class PromptFitter:
    """Fits prompts for one model."""

    def __init__(self, facts: ModelFacts, renderer: Renderer, caches: Caches) -> None:
        self._facts = facts
        self.renderer = renderer
        self._caches = caches

    def fit(self, request: TurnRequest) -> FittedPrompt:
        """Renders the request, without the oldest messages if the policy evicts whole turns.

        Raises:
            KvchatError: it can't be rendered, is too long, or the model does not support the policy.
        """
        limit = self.limit(request)
        evicted_messages = request.evicted_messages
        messages, rendered = self.render(request, evicted_messages)
        before = len(rendered.ids)
        gaps = leaves_gap(request.policy)
        reserve = min(request.sampling.max_tokens, limit // 8)
        by_turns = request.policy is EvictionPolicy.TURNS or (gaps and request.mode is CacheMode.OFF)
        if by_turns and before + reserve > limit:
            evicted_messages = self._shrunk(request, evicted_messages, int(limit * SHRUNK_TO))
            messages, rendered = self.render(request, evicted_messages)
        if self._least(request, messages, rendered) >= limit:
            self._refuse(request, rendered, limit)
        if gaps and self._facts.gap_refusal:
            raise KvchatError(f"The policy {request.policy} can't be used: {self._facts.gap_refusal}")
        evicted_tokens = max(0, before - len(rendered.ids))
        return FittedPrompt(messages, rendered, evicted_messages, evicted_tokens, limit)

    def render(
        self, request: TurnRequest, evicted_messages: int
    ) -> tuple[tuple[PromptMessage, ...], Rendered]:
        """The messages without the evicted ones, and their tokens."""
        messages = without_oldest(request.messages, evicted_messages)
        return messages, self.renderer.render(messages, request.today)

    def limit(self, request: TurnRequest) -> int:
        """Tokens that fit into the context and into the whole KV budget."""
        if request.mode is CacheMode.OFF:
            return self._facts.context_limit
        cache = self._caches.get(request.conversation)
        if cache is None or not self._caches.is_stored_as(cache, request.kv):
            cache = self._caches.empty(request.kv)
        return rows_within(cache.kv, self._caches.budget_bytes, self._facts.context_limit)

    def evict_for_answer(self, request: TurnRequest, evicted_messages: int, limit: int, answer: int) -> int:
        """How many messages are evicted once an answer of so many tokens has filled the context."""
        return self._shrunk(request, evicted_messages, int(limit * SHRUNK_TO) - answer)

    def _shrunk(self, request: TurnRequest, evicted_messages: int, target: int) -> int:
        """Messages to evict until the prompt has at most `target` tokens, or only one turn is left.

        Renders after each eviction: a template may add tokens before whichever message comes first.
        """
        while True:
            messages, rendered = self.render(request, evicted_messages)
            fits = len(rendered.ids) <= target
            more = 0 if fits else messages_to_evict(messages, rendered, target)
            if not more:
                return evicted_messages
            evicted_messages += more

    def _least(self, request: TurnRequest, messages: Sequence[PromptMessage], rendered: Rendered) -> int:
        """Tokens that have to fit at once, whatever the policy evicts."""
        policy = POLICIES[request.policy.value]
        if not policy.leaves_gap or request.mode is CacheMode.OFF:
            return len(rendered.ids)
        if not policy.needs_scores:
            return 0
        turns = layout_of(messages, rendered).turns
        return SINKS + len(rendered.ids) - (turns[-1] if turns else 0)

    def _refuse(self, request: TurnRequest, rendered: Rendered, limit: int) -> None:
        what = "the KV budget" if limit < self._facts.context_limit else "the context"
        choices = "Start a new conversation, or send a shorter message."
        if request.policy is EvictionPolicy.NONE and len(request.messages) > 2:
            choices = (
                "Choose what may be dropped with /policy (turns is exact, sinks costs nothing), "
                "or start a new conversation."
            )
        raise KvchatError(
            f"This conversation is {len(rendered.ids):,} tokens and {what} holds {limit:,}, "
            f"so there is no room for an answer. {choices}"
        )


def rows_within(kv: ConversationKV, budget: int, most: int) -> int:
    """Rows, at most `most`, to which a cache can grow with a peak of `budget` bytes.

    Growing copies layer by layer, so the peak includes one layer's old memory.
    """

    def peak(rows: int) -> int:
        copying = max((layer.bytes_at(max(0, rows - GROWTH_STEP)) for layer in kv.stored), default=0)
        return kv.bytes_at(rows) + copying

    fitting = (rows for rows in range(rounded_up(most), 0, -GROWTH_STEP) if peak(rows) <= budget)
    return min(most, next(fitting, 0))
