"""Runs one turn: prefill, then token by token until the answer ends.

Follows the plan and, where the answer fills the context, evicts as the policy says. Must not depend on where
the cache came from.
"""

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch

from kvchat.contract import (
    CacheEventKind,
    CacheMode,
    Evicted,
    EvictionPolicy,
    FinishReason,
    PrefillProgress,
    Sampling,
    Tokens,
    TurnEvent,
    TurnRequest,
)
from kvchat.engine.cache_manager import Caches, ResidentCache
from kvchat.engine.cache_source import reusable
from kvchat.engine.detokenizer import Detokenizer
from kvchat.engine.event_log import EventLog
from kvchat.engine.eviction import close_position_gaps, evict_rows, layout_of, leaves_gap
from kvchat.engine.model.forward import Stopped
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.planner import Planner, TurnPlan
from kvchat.engine.sampler import Sampler
from kvchat.engine.speculative import Drafter
from kvchat.engine.turn_timer import TurnTimer
from kvchat.errors import KvchatError

PREFILL_CHUNK = 512
"""Tokens per forward pass of the prefill; each is followed by a commit and a progress event."""
CONTEXT_OF_TEXT = 8
"""Tokens before a continued answer that are given to the detokenizer as context."""


@dataclass(frozen=True, slots=True)
class EngineServices:
    """The parts of an engine that every turn uses."""

    loaded: LoadedModel
    caches: Caches
    planner: Planner
    event_log: EventLog
    prefill_chunk: int
    is_stopped: Callable[[str], bool]
    new_drafter: Callable[[], Drafter | None]
    """Makes the drafter of one turn, if drafting is on."""
    new_sampler: Callable[[Sampling], Sampler]
    """Makes the sampler of one turn."""


@dataclass(slots=True)
class Answer:
    """The answer so far."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason = FinishReason.STOP


class Turn:
    """One running turn."""

    def __init__(
        self,
        services: EngineServices,
        request: TurnRequest,
        plan: TurnPlan,
        cache: ResidentCache,
        timer: TurnTimer,
    ) -> None:
        self._services = services
        self._loaded = services.loaded
        self.request = request
        self.plan = plan
        """Replaced where the answer fills the context and messages are evicted."""
        self.cache = cache
        self.timer = timer
        self.answer = Answer()
        self.reader = self._loaded.reader(cache.kv)
        if request.mode is CacheMode.OFF:
            self.reader = self._loaded.uncached_reader()
        self._sampler = services.new_sampler(request.sampling)
        self._detokenizer = Detokenizer(self._loaded.tokenizer)
        can_go_back = request.mode is not CacheMode.OFF and not cache.kv.states
        self._drafter = services.new_drafter() if can_go_back else None

    def run(self) -> Iterator[TurnEvent]:
        """Generates the answer; a stop ends it early and keeps what there is."""
        if self.plan.evicted_tokens:
            yield self._evicted(self.plan.evicted_tokens)
        try:
            yield from self._generate()
        except Stopped:
            self.answer.finish = FinishReason.CANCELLED

    @property
    def _leaves_gaps(self) -> bool:
        """Whether rows are evicted when the context is full."""
        return leaves_gap(self.request.policy) and self.request.mode is not CacheMode.OFF

    @property
    def _tokens(self) -> list[int]:
        """The prompt and the answer so far."""
        return [*self.plan.rendered.ids, *self.answer.ids]

    @property
    def _filled(self) -> int:
        """Tokens in the context once the last one is read."""
        if self._leaves_gaps:
            return len(self.cache.kv) + 1
        return len(self.plan.rendered.ids) + len(self.answer.ids)

    def _generate(self) -> Iterator[TurnEvent]:
        """Prefills, then decodes until the turn ends."""
        logits = yield from self._prefill()
        goes_on = self.request.messages[-1].role == "assistant"
        before = self.plan.rendered.ids[-CONTEXT_OF_TEXT:] if goes_on else ()
        self._detokenizer = Detokenizer(self._loaded.tokenizer, before)
        draft: list[int] = []
        while not (yield from self._choose(logits, draft)):
            if self._filled >= self.plan.limit:
                draft, rest = [], (yield from self._make_context())
                if not rest:
                    self.answer.finish = FinishReason.CONTEXT
                    return
                logits = self._read(rest)
            else:
                draft = self._draft()
                logits = self._read([self.answer.ids[-1], *draft], keep=1 + len(draft))

    def _choose(self, logits: torch.Tensor, draft: Sequence[int]) -> Generator[TurnEvent, None, bool]:
        """Samples from each row of `logits` while the draft is right; returns whether the turn ended.

        Cropping the cache removes the rejected rest of the draft.
        """
        sampler, kv, confirmed = self._sampler, self.cache.kv, 0
        try:
            for row in logits[:, None]:
                token = sampler.choose(row, self._tokens if sampler.reads_context else ())
                if (yield from self._emit(token, len(draft) - confirmed)):
                    return True
                if confirmed == len(draft) or token != draft[confirmed]:
                    return False
                confirmed += 1
        finally:
            self.timer.accepted_tokens += confirmed
            if rejected := len(draft) - confirmed:
                kv.truncate(len(kv.ids) - rejected)
            if draft and self._drafter:
                self._drafter.record(len(draft), confirmed)
        return False

    def _emit(self, token: int, unconfirmed: int) -> Generator[TurnEvent, None, bool]:
        """Adds a token to the answer; returns whether the turn ends with it."""
        request, answer, kv = self.request, self.answer, self.cache.kv
        answer.ids.append(token)
        ends = token in self._loaded.end_ids
        text = "" if ends else self._detokenizer.step(token)
        answer.text += text
        took = self.timer.token(text)
        if ends:
            return True
        tokenizer, tokens = self._loaded.facts.tokenizer, len(kv) - unconfirmed
        yield Tokens(request.turn, text, (token,), (took,), tokenizer, tokens, kv.storage_bytes)
        if end := self._end():
            answer.finish = end
        return end is not None

    def _draft(self) -> list[int]:
        """Draft tokens, read in one pass with the last token."""
        if self._drafter is None:
            return []
        kv = self.cache.kv
        most = min(
            self.plan.limit - self._filled - 1,
            self.request.sampling.max_tokens - len(self.answer.ids) - 1,
            # a draft must not finish a block: quantisation can't be undone
            sys.maxsize if kv.block == 1 else kv.block - len(kv) % kv.block - 1,
        )
        proposed = self._drafter.propose(self._tokens, most) if most > 0 else []
        # a draft model may have a larger vocabulary
        draft = list(takewhile(lambda token: token < self._loaded.vocabulary, proposed))
        self.timer.drafted_tokens += len(draft)
        return draft

    def _prefill(self) -> Generator[TurnEvent, None, torch.Tensor]:
        """Reads the tokens that are not cached; returns the logits of the first new token."""
        request, timer = self.request, self.timer
        timer.begin_prefill()
        unread = self.plan.unread
        ends = self._chunk_ends(len(unread))
        done = 0
        for end in ends:
            if self._leaves_gaps and len(self.cache.kv) + end - done > self.plan.limit:
                yield from self._evict_rows()
                self._check_fits(end - done)
            if end == len(unread):
                self.cache.kv.checkpoint()
            logits = self._read(unread[done:end])
            done = end
            timer.read(done)
            if len(ends) > 1 + bool(self.cache.kv.states):
                yield PrefillProgress(request.turn, done, len(unread))
        self._services.planner.rate.note(timer.prefill_read, timer.prefill_s)
        reserve = min(request.sampling.max_tokens, self.plan.limit // 8)
        if self._leaves_gaps and len(self.cache.kv) + reserve > self.plan.limit:
            yield from self._evict_rows()
        return logits

    def _chunk_ends(self, unread: int) -> list[int]:
        """The end of each forward pass over the unread tokens."""
        if self.request.mode is CacheMode.OFF:
            return [unread]
        # an eviction frees half of the context
        most = max(1, self.plan.limit // 2) if self._leaves_gaps else sys.maxsize
        chunk = min(self._services.prefill_chunk, most)
        ends = [*range(chunk, unread, chunk), unread]
        if self.cache.kv.states and unread > 1:
            # a checkpoint before the last token lets every regeneration start there
            ends = [*(e for e in ends if e < unread - 1), unread - 1, unread]
        return ends

    def _read(self, ids: Sequence[int], keep: int = 1) -> torch.Tensor:
        """One forward pass, after making room in the memory budget."""
        if self.request.mode is not CacheMode.OFF:
            # most tokens fit into allocated memory; counting all caches for each of them would be slow
            if self.cache.kv.bytes_to_read(len(ids)):
                self._services.caches.make_room(lambda: self.cache.kv.bytes_to_read(len(ids)))
            self._unshare(len(ids))
            if self._leaves_gaps and (moved := close_position_gaps(self._loaded, self.cache.kv, len(ids))):
                self.reader.evaluated += moved.reread
                self._services.event_log.log(
                    self.request.conversation, CacheEventKind.EVICT, 0, note=moved.note
                )
        return self.reader.read(ids, keep)

    def _unshare(self, tokens: int) -> None:
        """Copies memory that a fork shares before the first write, and logs how long that took."""
        kv, started = self.cache.kv, time.perf_counter()
        if copied := kv.unshare(tokens):
            took = time.perf_counter() - started
            note = "copy-on-write: shared memory was copied"
            conversation = self.request.conversation
            self._services.event_log.log(
                conversation, CacheEventKind.FORK, len(kv), size=copied, seconds=took, note=note
            )

    def _make_context(self) -> Generator[TurnEvent, None, list[int]]:
        """Evicts when the answer has filled the context; returns the tokens to read next.

        Returns none where the policy evicts nothing.
        """
        request, answer = self.request, self.answer
        if self._leaves_gaps:
            before = len(self.cache.kv)
            yield from self._evict_rows()
            return answer.ids[-1:] if len(self.cache.kv) < before else []
        if request.policy is not EvictionPolicy.TURNS:
            return []
        prompts, plan = self._services.planner.prompts, self.plan
        evicted_messages = prompts.evict_for_answer(
            request, plan.evicted_messages, plan.limit, len(answer.ids)
        )
        if evicted_messages == plan.evicted_messages:
            return []
        messages, rendered = prompts.render(request, evicted_messages)
        if len(rendered.ids) + len(answer.ids) >= plan.limit:
            return []
        self.plan = replace(plan, messages=messages, rendered=rendered, evicted_messages=evicted_messages)
        yield self._evicted(len(plan.rendered.ids) - len(rendered.ids))
        self.cache.messages, self.cache.evicted_messages = messages, evicted_messages
        if request.mode is CacheMode.OFF:
            self.reader = self._loaded.uncached_reader(self.reader.evaluated)
            return self._tokens
        kv, wanted = self.cache.kv, self._tokens
        kv.truncate(reusable(kv, wanted))
        rest = wanted[len(kv.ids) :]
        for start in range(0, len(rest) - 1, self._services.prefill_chunk):
            self._read(rest[start : min(start + self._services.prefill_chunk, len(rest) - 1)])
        return rest[-1:]

    def _check_fits(self, tokens: int) -> None:
        """Raises `KvchatError` where the policy could not evict enough to read so many tokens."""
        if len(self.cache.kv) + tokens > self.plan.limit:
            raise KvchatError(
                f"The tokens that {self.request.policy} never evicts and the next {tokens:,} are more than "
                f"{self.plan.limit:,}. Send a shorter message, or choose another policy with /policy."
            )

    def _evict_rows(self) -> Iterator[Evicted]:
        request, cache = self.request, self.cache
        prompt = layout_of(self.plan.messages, self.plan.rendered)
        done = evict_rows(self._loaded, cache.kv, request.policy.value, prompt, self.plan.limit)
        self.reader.evaluated += done.reread
        self.timer.evicted_tokens += done.tokens
        if done.tokens:
            self._services.event_log.log(
                request.conversation, CacheEventKind.EVICT, done.tokens, note=done.note
            )
            yield Evicted(request.turn, done.tokens, done.note, self.plan.evicted_messages)

    def _evicted(self, tokens: int) -> Evicted:
        """Logs an eviction of whole messages."""
        self.timer.evicted_tokens += tokens
        note = f"the {self.plan.evicted_messages} oldest messages are evicted; the rest is read again: exact"
        self._services.event_log.log(self.request.conversation, CacheEventKind.EVICT, tokens, note=note)
        return Evicted(self.request.turn, tokens, note, self.plan.evicted_messages)

    def _end(self) -> FinishReason | None:
        if self._services.is_stopped(self.request.turn):
            return FinishReason.CANCELLED
        if len(self.answer.ids) >= self.request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None
