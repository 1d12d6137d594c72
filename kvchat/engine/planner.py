"""What a turn will reuse, read and leave out, and why: decided before anything happens.

The same plan is the price that is quoted before an act, and what the turn then carries out.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from kvchat.cache.eviction import POLICIES, SINKS, dropped, turns_in
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.prefix import reusable_prefix
from kvchat.contract import (
    CacheMode,
    EvictionPolicy,
    KVPrecision,
    Miss,
    ModelFacts,
    PromptMessage,
    TurnRequest,
)
from kvchat.engine import miss_reason
from kvchat.engine.cache_manager import Caches, ResidentCache
from kvchat.engine.disk_tier import DiskTier, SavedCache
from kvchat.engine.eviction import SHRUNK_TO, layout_of, messages_to_drop, without_oldest
from kvchat.engine.prompt import Rendered, Renderer
from kvchat.errors import KvchatError

LEAST_SHARED = 16
"""Tokens that another conversation's cache must save before it is shared."""


@dataclass(frozen=True, slots=True)
class OwnCache:
    """The conversation's cache in memory."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The prefix of another conversation's cache."""

    lender: str


Source = OwnCache | SharedPrefix | SavedCache


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """One turn, decided."""

    messages: tuple[PromptMessage, ...]
    """Those that are not left out."""
    rendered: Rendered
    evicted_messages: int
    evicted_tokens: int
    """Tokens of the messages that are left out from this turn on."""
    limit: int
    """Tokens that fit: the model's context, or what the KV budget holds."""
    source: Source
    reused: int
    """Tokens of the prompt that are not read again."""
    rows: int
    """Rows that stand for them: fewer after an eviction that left a gap."""
    miss: Miss | None
    note: str
    """Why less is reused than the history; empty where all of it is."""

    @property
    def unread(self) -> tuple[int, ...]:
        """The tokens that have to be read."""
        return self.rendered.ids[self.reused :]


@dataclass(slots=True)
class Rate:
    """The prefill rate, from the largest of the latest reads."""

    tokens_per_s: float | None = None
    tokens: int = 0

    def note(self, tokens: int, seconds: float) -> None:
        """Takes a measured read into account; small ones say more about overhead."""
        if tokens >= max(64, self.tokens // 4) and seconds > 0:
            self.tokens, self.tokens_per_s = tokens, tokens / seconds

    def hint(self, tokens_per_s: float) -> None:
        """Takes what earlier turns measured, until there is a measurement of this run."""
        if self.tokens_per_s is None and tokens_per_s > 0:
            self.tokens_per_s = tokens_per_s

    def seconds(self, tokens: int) -> float | None:
        """What reading so many tokens takes; None before anything was measured."""
        return tokens / self.tokens_per_s if self.tokens_per_s else None


class Planner:
    """Plans turns for one model."""

    def __init__(
        self, facts: ModelFacts, renderer: Renderer, caches: Caches, disk: DiskTier | None, rate: Rate
    ) -> None:
        self._facts = facts
        self._renderer = renderer
        self._caches = caches
        self._disk = disk
        self.rate = rate

    def count(self, text: str) -> int:
        """Tokens of a typed text by itself."""
        return self._renderer.count(text)

    def plan(self, request: TurnRequest) -> TurnPlan:
        """Decides a turn; nothing changes.

        Raises:
            KvchatError: the conversation can't be rendered, or is longer than the context and may not shrink.
        """
        self.rate.hint(request.known_prefill_tok_s)
        limit = self.limit(request)
        evicted_messages, before = request.evicted_messages, 0
        messages, rendered = self.rendered(request, evicted_messages)
        if request.policy is EvictionPolicy.TURNS or (request.mode is CacheMode.OFF and self._gap(request)):
            evicted_messages, before = self._set_evicted(request, rendered, limit)
        if evicted_messages != request.evicted_messages:
            messages, rendered = self.rendered(request, evicted_messages)
        if self._least(request, messages, rendered) >= limit:
            self._refuse(request, rendered, limit)
        if self._gap(request) and self._facts.gap_refusal:
            raise KvchatError(f"The policy {request.policy} can't be used: {self._facts.gap_refusal}")
        evicted = max(0, before - len(rendered.ids))
        source, reused, refused = self._source(request, rendered)
        miss = self._miss(request, messages, rendered, (source, reused), evicted_messages, refused)
        note = self._note(request, messages, miss)
        rows = self._rows(request, source, reused)
        return TurnPlan(
            messages, rendered, evicted_messages, evicted, limit, source, reused, rows, miss, note
        )

    def rendered(
        self, request: TurnRequest, evicted_messages: int
    ) -> tuple[tuple[PromptMessage, ...], Rendered]:
        """The messages without the oldest ones, and what the model reads of them."""
        messages = without_oldest(request.messages, evicted_messages)
        return messages, self._renderer.render(messages, request.today)

    def limit(self, request: TurnRequest) -> int:
        """Tokens that fit into the context and into the whole KV budget."""
        if request.mode is CacheMode.OFF:
            return self._facts.context_limit
        kept = self._caches.get(request.conversation)
        kv = kept.kv if kept and self.fits(kept, request.kv) else self._caches.empty(request.kv).kv
        return kv.rows_within(self._caches.budget_bytes, self._facts.context_limit)

    def more_to_evict(self, request: TurnRequest, plan: TurnPlan, answer: int) -> int:
        """How many messages are left out once the answer has filled the context in mid-turn."""
        return self._shrunk(request, plan.evicted_messages, int(plan.limit * SHRUNK_TO) - answer)

    def preview(self, request: TurnRequest, plan: TurnPlan) -> str:
        """What the policy would drop if it had to act now."""
        policy = POLICIES[request.policy.value]
        layout = layout_of(plan.messages, plan.rendered)
        if request.policy is EvictionPolicy.NONE:
            return "nothing is dropped: at the limit the answer ends and the next one is refused"
        if request.policy is EvictionPolicy.SNAPKV:
            return "the half that the latest question attends to least; 32 tokens are read again to score"
        gone = dropped(layout.tokens, policy.keep(layout, int(layout.tokens * SHRUNK_TO)))
        tokens = sum(len(r) for r in gone)
        if not gone:
            return "nothing: there is only the turn under way"
        if not policy.leaves_gap:
            again = layout.tokens - gone[-1].stop
            turns = turns_in(layout, gone)
            price = self.rate.seconds(again)
            cost = f", about {price:.1f} s" if price else ""
            oldest = "the oldest turn" if turns == 1 else f"the {turns} oldest turns"
            return f"{oldest} ({tokens:,} tokens); {again:,} that stay are read again{cost}: exact"
        spans = ", ".join(f"{r.start:,}-{r.stop - 1:,}" for r in gone)
        return f"tokens {spans} ({tokens:,}); nothing is read again: approximate"

    def _gap(self, request: TurnRequest) -> bool:
        return POLICIES[request.policy.value].leaves_gap

    def _set_evicted(self, request: TurnRequest, rendered: Rendered, limit: int) -> tuple[int, int]:
        """(messages to leave out, tokens of the prompt with them)."""
        reserve = min(request.sampling.max_tokens, limit // 8)
        before = len(rendered.ids)
        if before + reserve <= limit:
            return request.evicted_messages, before
        return self._shrunk(request, request.evicted_messages, int(limit * SHRUNK_TO)), before

    def _shrunk(self, request: TurnRequest, evicted_messages: int, target: int) -> int:
        """Messages to leave out until the prompt has at most `target` tokens, or only one turn is left.

        Not all at once: what a template puts before the first message stays, whichever message is the first.
        """
        while True:
            messages, rendered = self.rendered(request, evicted_messages)
            fits = len(rendered.ids) <= target
            more = 0 if fits else messages_to_drop(messages, rendered, target)
            if not more:
                return evicted_messages
            evicted_messages += more

    def _least(self, request: TurnRequest, messages: Sequence[PromptMessage], rendered: Rendered) -> int:
        """Tokens that have to fit at once, whatever the policy lets go of."""
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

    def fits(self, kept: ResidentCache, asked: KVPrecision) -> bool:
        """Whether a cache is stored as asked; one that may be lowered may have been."""
        return kept.precision is self._caches.real(asked) or (asked is KVPrecision.AUTO and kept.auto)

    def _source(self, request: TurnRequest, rendered: Rendered) -> tuple[Source, int, str]:
        """(where the reused tokens come from, how many they are, why a cache was refused)."""
        if request.mode is not CacheMode.ON:
            return OwnCache(), 0, ""
        best: tuple[Source, int] = (OwnCache(), 0)
        refused = ""
        kept = self._caches.get(request.conversation)
        if kept and self.fits(kept, request.kv):
            best = (OwnCache(), self.reusable(kept.kv, rendered.ids, gaps=self._gap(request)))
        elif kept:
            refused = f"KV precision changed: {kept.precision} → {self._caches.real(request.kv)}"
        hot = kept is not None and not refused and not kept.prefix_only
        saved, why = (None, "") if hot else self._saved(request)
        restorable = saved.reusable(rendered.ids, gaps=self._gap(request)) if saved else 0
        if saved and restorable > best[1]:
            best = (saved, restorable)
        loans = [
            (self.reusable(other.kv, rendered.ids), name)
            for name, other in self._caches.others(request.conversation)
            if other.precision is self._caches.real(request.kv)
        ]
        reach, lender = max(loans, default=(0, ""))
        if reach > best[1] + LEAST_SHARED:
            best = (SharedPrefix(lender), reach)
        return *best, refused or why

    def _saved(self, request: TurnRequest) -> tuple[SavedCache | None, str]:
        """What lies on disk and may be used, or why it may not."""
        if self._disk is None or not request.persist:
            return None, ""
        try:
            saved = self._disk.find(request.conversation)
        except KvchatError as error:
            return None, str(error)
        if saved is None:
            return None, ""
        wanted = self._caches.fingerprint(self._caches.real(request.kv))
        difference = wanted.difference(saved.fingerprint)
        needed = self._caches.empty(request.kv).kv.bytes_at(saved.most_rows)
        if not difference and needed > self._caches.budget_bytes:
            difference = f"what is saved takes {needed / 1e6:,.1f} MB, more than the KV budget"
        return (None, difference) if difference else (saved, "")

    def _rows(self, request: TurnRequest, source: Source, reused: int) -> int:
        """Rows that the cache keeps for so many tokens."""
        if isinstance(source, SharedPrefix) or not reused:
            return reused
        kept = self._caches.get(request.conversation)
        rows = source.chain.rows if isinstance(source, SavedCache) else kept.kv.rows if kept else ()
        return bisect_left(rows, reused)

    def reusable(self, kv: ConversationKV, prompt: Sequence[int], *, gaps: bool = False) -> int:
        """Tokens of the prompt that this cache holds and can go back to; at least one is left to read."""
        same = reusable_prefix(kv.ids, prompt)
        return kv.reachable(same if gaps else min(same, kv.first_gap))

    def seconds(self, tokens: int) -> float | None:
        """What reading so many tokens takes at the rate measured so far."""
        return self.rate.seconds(tokens)

    def _miss(
        self,
        request: TurnRequest,
        messages: Sequence[PromptMessage],
        rendered: Rendered,
        found: tuple[Source, int],
        evicted_messages: int,
        refused: str,
    ) -> Miss | None:
        """Why tokens of earlier messages are read again; None where none are."""
        # the id sampled last was never read: reading it now is no loss
        source, reused = found
        again = miss_reason.read_before(rendered) - reused - 1
        if again <= 0 or request.mode is not CacheMode.ON or not miss_reason.has_history(messages):
            return None
        price = self.rate.seconds(again)
        kept = self._caches.get(request.conversation)
        if isinstance(source, SavedCache):
            held: Sequence[int] = source.chain.ids
        elif kept and kept.kv and not kept.prefix_only and not refused:
            held = kept.kv.ids
        else:
            gone = self._caches.drop_reasons.get(request.conversation, "")
            return Miss(refused or gone or miss_reason.NOT_READ_YET, again, price)
        token, message, was, now = miss_reason.difference_at(held, rendered, self._renderer.decode)
        if message < len(messages) and messages[0].role != "system":
            message += 1
        message += evicted_messages if message else 0
        if kept and not isinstance(source, SavedCache):
            cause = self._cause(request, kept, messages, evicted_messages, token)
        else:
            cause = miss_reason.CHANGED_SINCE_SAVED if token < len(held) else miss_reason.NOT_CACHED
        before = miss_reason.text_before(rendered, token, self._renderer.decode)
        return Miss(cause, again, price, token, was, now, message, before)

    def _cause(
        self,
        request: TurnRequest,
        kept: ResidentCache,
        messages: Sequence[PromptMessage],
        evicted_messages: int,
        token: int,
    ) -> str:
        if evicted_messages != kept.evicted_messages:
            return miss_reason.TURNS_LEFT_OUT
        if kept.kv.has_gap and (token <= kept.kv.last_gap_end or not self._gap(request)):
            return miss_reason.BEFORE_A_GAP
        if kept.kv.states and token >= len(kept.kv.ids):
            return miss_reason.BEFORE_A_CHECKPOINT
        if token >= len(kept.kv.ids):
            return miss_reason.NOT_CACHED
        if not kept.messages:  # it came from disk, where there are no texts
            return miss_reason.CHANGED_SINCE_SAVED
        return miss_reason.explain_difference(kept.messages, messages, evicted_messages)

    def _note(self, request: TurnRequest, messages: Sequence[PromptMessage], miss: Miss | None) -> str:
        if not miss_reason.has_history(messages):
            return ""
        if request.mode is not CacheMode.ON:
            return miss_reason.NEVER_CACHED[request.mode]
        return miss.cause if miss else ""
