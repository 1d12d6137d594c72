"""Plans a turn before anything happens: the prompt that fits, the cache it starts from, and why of a miss.

The same plan is the cost estimate shown to the user, and what the turn then carries out.
"""

from dataclasses import dataclass

from kvchat.cache.eviction import POLICIES, evicted, turns_in
from kvchat.contract import CacheMode, EvictionPolicy, Miss, ModelFacts, PromptMessage, TurnRequest
from kvchat.engine.cache_manager import Caches
from kvchat.engine.cache_source import Source, find_source
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.eviction import SHRUNK_TO, layout_of
from kvchat.engine.miss_reason import NEVER_CACHED, explain_miss, has_history
from kvchat.engine.prefill_rate import PrefillRate
from kvchat.engine.prompt import Rendered, Renderer
from kvchat.engine.prompt_fitting import PromptFitter


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """A planned turn."""

    messages: tuple[PromptMessage, ...]
    """Those that are not evicted."""
    rendered: Rendered
    evicted_messages: int
    evicted_tokens: int
    """Tokens of the messages that this turn evicts."""
    limit: int
    """Tokens that fit: the model's context, or what the KV budget can store."""
    source: Source
    reused: int
    """Tokens of the prompt that are not read again."""
    rows: int
    """Their rows in the cache: fewer after an eviction that left a gap."""
    miss: Miss | None
    note: str
    """Why less than the history is reused; empty where all of it is."""

    @property
    def unread(self) -> tuple[int, ...]:
        """The tokens that have to be read."""
        return self.rendered.ids[self.reused :]


class Planner:
    """Plans turns for one model."""

    def __init__(self, facts: ModelFacts, renderer: Renderer, caches: Caches, disk: DiskTier | None) -> None:
        self.prompts = PromptFitter(facts, renderer, caches)
        self.rate = PrefillRate()
        self._caches = caches
        self._disk = disk

    def plan(self, request: TurnRequest) -> TurnPlan:
        """Plans a turn without changing anything.

        Raises:
            KvchatError: the conversation can't be rendered, or is longer than the context and can't shrink.
        """
        self.rate.hint(request.known_prefill_tok_s)
        prompt = self.prompts.fit(request)
        reuse = find_source(request, prompt.rendered.ids, self._caches, self._disk)
        decode = self.prompts.renderer.decode
        miss = explain_miss(request, prompt, reuse, self._caches, self.rate, decode)
        note = miss.cause if miss else ""
        if request.mode is not CacheMode.ON and has_history(prompt.messages):
            note = NEVER_CACHED[request.mode]
        return TurnPlan(*prompt, reuse.source, reuse.tokens, reuse.rows, miss, note)

    def preview(self, request: TurnRequest, plan: TurnPlan) -> str:
        """What the policy would evict if the context were full now, and what that costs."""
        policy = POLICIES[request.policy.value]
        layout = layout_of(plan.messages, plan.rendered)
        if request.policy is EvictionPolicy.NONE:
            return "nothing is dropped: at the limit the answer ends and the next one is refused"
        if request.policy is EvictionPolicy.SNAPKV:
            return "the half that the latest question attends to least; 32 tokens are read again to score"
        ranges = evicted(layout.tokens, policy.keep(layout, int(layout.tokens * SHRUNK_TO)))
        tokens = sum(len(r) for r in ranges)
        if not ranges:
            return "nothing: there is only the turn under way"
        if not policy.leaves_gap:
            again = layout.tokens - ranges[-1].stop
            turns = turns_in(layout, ranges)
            seconds = self.rate.seconds(again)
            cost = f", about {seconds:.1f} s" if seconds else ""
            oldest = "the oldest turn" if turns == 1 else f"the {turns} oldest turns"
            return f"{oldest} ({tokens:,} tokens); {again:,} that stay are read again{cost}: exact"
        spans = ", ".join(f"{r.start:,}-{r.stop - 1:,}" for r in ranges)
        return f"tokens {spans} ({tokens:,}); nothing is read again: approximate"
