"""One turn, carried out: prefill, then one token at a time until something ends it.

It does what the plan says and, where the answer fills the context, what the policy lets go. It knows one
cache and one conversation; it refuses to know how the cache came to be there.
"""

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch

from kvchat.cache.eviction import POLICIES
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
from kvchat.engine.detokenizer import Detokenizer
from kvchat.engine.event_log import EventLog
from kvchat.engine.eviction import Room, evict_rows, keep_positions, layout_of
from kvchat.engine.model.forward import Stopped
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.planner import Planner, TurnPlan
from kvchat.engine.sampler import Sampler
from kvchat.engine.speculative import Drafter
from kvchat.engine.turn_timer import TurnTimer
from kvchat.errors import KvchatError

PREFILL_CHUNK = 512
"""Tokens read between two looks at the clock, two progress events and two commits."""
CONTEXT_OF_TEXT = 8
"""Tokens before a continued answer that its first text is decoded after."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What every turn of an engine works with."""

    loaded: LoadedModel
    caches: Caches
    planner: Planner
    event_log: EventLog
    prefill_chunk: int
    is_stopped: Callable[[str], bool]
    new_drafter: Callable[[], Drafter | None]
    """What guesses ahead in one turn, if anything does."""
    new_sampler: Callable[[Sampling], Sampler]
    """What chooses the tokens of one turn."""


@dataclass(slots=True)
class Answer:
    """What the turn has produced so far."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason = FinishReason.STOP


class Turn:
    """One turn under way."""

    def __init__(
        self, tools: Tools, request: TurnRequest, plan: TurnPlan, kept: ResidentCache, meter: TurnTimer
    ) -> None:
        self._tools = tools
        self._loaded = tools.loaded
        self.request = request
        self.plan = plan
        """Changes where the answer fills the context and messages are left out."""
        self.kept = kept
        self.meter = meter
        self.answer = Answer()
        self.reader = self._loaded.reader(kept.kv)
        if request.mode is CacheMode.OFF:
            self.reader = self._loaded.uncached_reader()
        self._sampler = tools.new_sampler(request.sampling)
        self._detokenizer = Detokenizer(self._loaded.tokenizer)
        can_go_back = request.mode is not CacheMode.OFF and not kept.kv.states
        self._drafter = tools.new_drafter() if can_go_back else None

    def run(self) -> Iterator[TurnEvent]:
        """Answers; a stop ends it and keeps what there is."""
        if self.plan.evicted_tokens:
            yield self._evicted(self.plan.evicted_tokens)
        try:
            yield from self._generate()
        except Stopped:
            self.answer.finish = FinishReason.CANCELLED

    @property
    def _leaves_gaps(self) -> bool:
        """Whether a full context is made smaller by dropping rows."""
        return POLICIES[self.request.policy.value].leaves_gap and self.request.mode is not CacheMode.OFF

    @property
    def _tokens(self) -> list[int]:
        """The prompt and the answer so far."""
        return [*self.plan.rendered.ids, *self.answer.ids]

    @property
    def _filled(self) -> int:
        """Tokens that count against the context once the last one is read."""
        if self._leaves_gaps:
            return len(self.kept.kv) + 1
        return len(self.plan.rendered.ids) + len(self.answer.ids)

    def _generate(self) -> Iterator[TurnEvent]:
        """Prefill, then one token after the other until something ends the turn."""
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
        """Chooses a token from each row of `logits` while the draft is right; whether the turn ended.

        What was read of the draft beyond that is taken back.
        """
        sampler, kv, confirmed = self._sampler, self.kept.kv, 0
        try:
            for row in logits[:, None]:
                token = sampler.choose(row, self._tokens if sampler.reads_context else ())
                if (yield from self._say(token, len(draft) - confirmed)):
                    return True
                if confirmed == len(draft) or token != draft[confirmed]:
                    return False
                confirmed += 1
        finally:
            self.meter.accepted_tokens += confirmed
            if wrong := len(draft) - confirmed:
                kv.truncate(len(kv.ids) - wrong)
            if draft and self._drafter:
                self._drafter.judge(len(draft), confirmed)
        return False

    def _say(self, token: int, unconfirmed: int) -> Generator[TurnEvent, None, bool]:
        """Adds a token to the answer; whether the turn ends with it."""
        request, answer, kv = self.request, self.answer, self.kept.kv
        answer.ids.append(token)
        ends = token in self._loaded.end_ids
        text = "" if ends else self._detokenizer.step(token)
        answer.text += text
        took = self.meter.token(text)
        if ends:
            return True
        tokenizer, tokens = self._loaded.facts.tokenizer, len(kv) - unconfirmed
        yield Tokens(request.turn, text, (token,), (took,), tokenizer, tokens, kv.storage_bytes)
        if end := self._end():
            answer.finish = end
        return end is not None

    def _draft(self) -> list[int]:
        """Tokens that may follow the last one, to be read with it."""
        if self._drafter is None:
            return []
        kv = self.kept.kv
        most = min(
            self.plan.limit - self._filled - 1,
            self.request.sampling.max_tokens - len(self.answer.ids) - 1,
            # a guess must not finish a block: what is quantised stays so
            sys.maxsize if kv.block == 1 else kv.block - len(kv) % kv.block - 1,
        )
        guessed = self._drafter.propose(self._tokens, most) if most > 0 else []
        # another model may know ids that this one has no row for
        draft = list(takewhile(lambda token: token < self._loaded.vocabulary, guessed))
        self.meter.drafted_tokens += len(draft)
        return draft

    def _prefill(self) -> Generator[TurnEvent, None, torch.Tensor]:
        """Reads what the cache doesn't hold; returns the logits that choose the first token."""
        request, meter = self.request, self.meter
        meter.begin_prefill()
        unread = self.plan.unread
        ends = self._chunk_ends(len(unread))
        done = 0
        for end in ends:
            if self._leaves_gaps and len(self.kept.kv) + end - done > self.plan.limit:
                yield from self._evict_rows()
                self._check_fits(end - done)
            if end == len(unread):
                self.kept.kv.checkpoint()
            logits = self._read(unread[done:end])
            done = end
            meter.read(done)
            if len(ends) > 1 + bool(self.kept.kv.states):
                yield PrefillProgress(request.turn, done, len(unread))
        self._tools.planner.rate.note(meter.prefill_read, meter.prefill_s)
        reserve = min(request.sampling.max_tokens, self.plan.limit // 8)
        if self._leaves_gaps and len(self.kept.kv) + reserve > self.plan.limit:
            yield from self._evict_rows()
        return logits

    def _chunk_ends(self, unread: int) -> list[int]:
        """Where each forward pass over the unread tokens ends."""
        if self.request.mode is CacheMode.OFF:
            return [unread]
        # half of the context is what an eviction makes room for
        most = max(1, self.plan.limit // 2) if self._leaves_gaps else sys.maxsize
        chunk = min(self._tools.prefill_chunk, most)
        ends = [*range(chunk, unread, chunk), unread]
        if self.kept.kv.states and unread > 1:
            # where only marks can be gone back to, one before the last token serves every regeneration
            ends = [*(e for e in ends if e < unread - 1), unread - 1, unread]
        return ends

    def _read(self, ids: Sequence[int], keep: int = 1) -> torch.Tensor:
        """One forward pass, after its memory was made room for."""
        if self.request.mode is not CacheMode.OFF:
            # most tokens find room in what is allocated; counting every cache for each would cost
            if self.kept.kv.bytes_to_read(len(ids)):
                self._tools.caches.make_room(lambda: self.kept.kv.bytes_to_read(len(ids)))
            self._unshare(len(ids))
            if self._leaves_gaps and (room := keep_positions(self._loaded, self.kept.kv, len(ids))):
                self.reader.evaluated += room.reread
                self._tools.event_log.log(self.request.conversation, CacheEventKind.EVICT, 0, note=room.note)
        return self.reader.read(ids, keep)

    def _unshare(self, tokens: int) -> None:
        """The first write into memory that a fork shares copies it; the timeline says what that took."""
        kv, started = self.kept.kv, time.perf_counter()
        if copied := kv.unshare(tokens):
            took = time.perf_counter() - started
            note = "copied out of the memory it shared"
            conversation = self.request.conversation
            self._tools.event_log.log(
                conversation, CacheEventKind.FORK, len(kv), size=copied, seconds=took, note=note
            )

    def _make_context(self) -> Generator[TurnEvent, None, list[int]]:
        """The answer has filled the context: drops what the policy lets go; returns the tokens to read next.

        Nothing is returned where nothing may be dropped.
        """
        request, answer = self.request, self.answer
        if self._leaves_gaps:
            before = len(self.kept.kv)
            yield from self._evict_rows()
            return answer.ids[-1:] if len(self.kept.kv) < before else []
        if request.policy is not EvictionPolicy.TURNS:
            return []
        evicted_messages = self._tools.planner.more_to_evict(request, self.plan, len(answer.ids))
        if evicted_messages == self.plan.evicted_messages:
            return []
        messages, rendered = self._tools.planner.rendered(request, evicted_messages)
        if len(rendered.ids) + len(answer.ids) >= self.plan.limit:
            return []
        dropped = len(self.plan.rendered.ids) - len(rendered.ids)
        self.plan = replace(
            self.plan, messages=messages, rendered=rendered, evicted_messages=evicted_messages
        )
        yield self._evicted(dropped)
        self.kept.messages, self.kept.evicted_messages = messages, evicted_messages
        if request.mode is CacheMode.OFF:
            self.reader = self._loaded.uncached_reader(self.reader.evaluated)
            return self._tokens
        kv, wanted = self.kept.kv, self._tokens
        kv.truncate(self._tools.planner.reusable(kv, wanted))
        rest = wanted[len(kv.ids) :]
        for start in range(0, len(rest) - 1, self._tools.prefill_chunk):
            self._read(rest[start : min(start + self._tools.prefill_chunk, len(rest) - 1)])
        return rest[-1:]

    def _check_fits(self, tokens: int) -> None:
        """Raises `KvchatError` where the policy could not let go of enough to read so many tokens."""
        if len(self.kept.kv) + tokens > self.plan.limit:
            raise KvchatError(
                f"What {self.request.policy} may not drop and the next {tokens:,} tokens are more than "
                f"{self.plan.limit:,}. Send a shorter message, or choose another policy with /policy."
            )

    def _evict_rows(self) -> Iterator[Evicted]:
        request, kept = self.request, self.kept
        prompt = layout_of(self.plan.messages, self.plan.rendered)
        limit = self.plan.limit
        room: Room = evict_rows(self._loaded, kept.kv, request.policy.value, prompt, limit)
        self.reader.evaluated += room.reread
        self.meter.evicted_tokens += room.tokens
        if room.tokens:
            self._tools.event_log.log(request.conversation, CacheEventKind.EVICT, room.tokens, note=room.note)
            yield Evicted(request.turn, room.tokens, room.note, self.plan.evicted_messages)

    def _evicted(self, tokens: int) -> Evicted:
        """Whole messages were left out."""
        self.meter.evicted_tokens += tokens
        note = (
            f"the {self.plan.evicted_messages} oldest messages are left out; what stays is read again: exact"
        )
        self._tools.event_log.log(self.request.conversation, CacheEventKind.EVICT, tokens, note=note)
        return Evicted(self.request.turn, tokens, note, self.plan.evicted_messages)

    def _end(self) -> FinishReason | None:
        if self._tools.is_stopped(self.request.turn):
            return FinishReason.CANCELLED
        if len(self.answer.ids) >= self.request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None
