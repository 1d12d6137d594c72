"""The engine: answers turns, one at a time, and keeps one KV cache per conversation.

Every turn is one rule: render the whole conversation, find the longest common prefix with what the cache
holds, crop to it, read the rest, generate. Editing, regenerating, undoing, continuing, forking or changing
the system prompt need nothing else. It knows conversations by id only; what they are called and where their
texts are stored is elsewhere.
"""

import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kvchat.cache.evict import POLICIES
from kvchat.cache.saver import SaveResult
from kvchat.contract import (
    CacheAct,
    CacheEvent,
    CacheEventKind,
    CacheMode,
    Evicted,
    EvictionPolicy,
    FinishReason,
    PoolState,
    PrefillProgress,
    PromptMessage,
    Refused,
    Report,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from kvchat.engine import explain
from kvchat.engine.acts import do
from kvchat.engine.caches import Caches, Kept
from kvchat.engine.context import Room, evict_rows, keep_positions, layout_of
from kvchat.engine.detokenize import Detokenizer
from kvchat.engine.disk import DiskTier, Saved
from kvchat.engine.forward import CachedReader, Reader, Stopped, UncachedReader, stopping_between_layers
from kvchat.engine.identity import identify
from kvchat.engine.load import LoadedModel
from kvchat.engine.meter import Meter
from kvchat.engine.plan import Lent, Plan, Planner, Rate
from kvchat.engine.render import Renderer
from kvchat.engine.sample import Sampler
from kvchat.errors import KvchatError

PREFILL_CHUNK = 512
"""Tokens read between two looks at the clock, two progress events and two commits."""
CONTEXT_OF_TEXT = 8
"""Tokens before a continued answer that its first text is decoded after."""
UNBOUNDED = 1 << 62
"""A budget that nothing reaches."""


@dataclass(slots=True)
class Answer:
    """What one turn has produced so far."""

    ids: list[int]
    text: str = ""
    finish: FinishReason = FinishReason.STOP


@dataclass(slots=True)
class Turn:
    """One turn under way."""

    request: TurnRequest
    plan: Plan
    kept: Kept
    reader: Reader
    meter: Meter
    answer: Answer

    @property
    def leaves_gaps(self) -> bool:
        """Whether a full context is made smaller by dropping rows."""
        return POLICIES[self.request.policy.value].leaves_gap and self.request.mode is not CacheMode.OFF

    @property
    def tokens(self) -> list[int]:
        """The prompt and the answer so far."""
        return [*self.plan.rendered.ids, *self.answer.ids]

    @property
    def filled(self) -> int:
        """Tokens that count against the context once the last one is read."""
        return (
            len(self.kept.kv) + 1 if self.leaves_gaps else len(self.plan.rendered.ids) + len(self.answer.ids)
        )


def answered(messages: Sequence[PromptMessage], said: PromptMessage) -> tuple[PromptMessage, ...]:
    """The conversation with its answer, which may have been begun in an earlier turn."""
    begun = messages[-1]
    if begun.role != "assistant":
        return (*messages, said)
    ids = (*begun.token_ids, *said.token_ids)
    return (*messages[:-1], replace(said, text=begun.text + said.text, token_ids=ids))


class LocalEngine:
    """Runs a loaded model in this process; satisfies `contract.Engine`."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        budget_bytes: int = UNBOUNDED,
        disk: DiskTier | None = None,
        report: Callable[[Report], None] = lambda _report: None,
    ) -> None:
        """`report` gets what came of an act."""
        self.facts = loaded.facts
        self._loaded = loaded
        self._disk = disk
        self._report = report
        self._prefill_chunk = prefill_chunk
        self._events: list[CacheEvent] = []
        fingerprint = identify(loaded.model, loaded.chat, loaded.facts)
        if disk:
            disk.on_saved = self._note_saved
        self.caches = Caches(loaded.new_kv, fingerprint, budget_bytes, disk, self._events.append)
        renderer = Renderer(loaded.tokenizer, loaded.chat, loaded.facts.tokenizer)
        self.rate = Rate()
        self.planner = Planner(loaded.facts, renderer, self.caches, disk, self.rate)
        self._stopped_turn = ""
        self._closing = False

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Answers; every failure becomes a `TurnFailed`, and the cache stays consistent."""
        meter = Meter()
        self.caches.active = request.conversation
        try:
            with stopping_between_layers(self._loaded.model, lambda: self._is_stopped(request.turn)):
                yield from self._answer(request, meter)
        except KvchatError as error:
            yield TurnFailed(request.turn, str(error))
        except Exception as error:  # the engine outlives whatever a model or the memory does to one turn
            traceback.print_exc()
            yield TurnFailed(request.turn, f"The engine failed: {type(error).__name__}: {error}")

    def stop(self, turn: str) -> None:
        """Ends that turn before the next layer is computed."""
        self._stopped_turn = turn

    def stop_all(self) -> None:
        """Ends whatever turn runs, and every later one: nobody listens any more."""
        self._closing = True

    def act(self, act: CacheAct) -> None:
        """Does something to the caches and reports what came of it."""
        try:
            for report in do(act, self.caches, self.planner, self._loaded, self._disk):
                self._report(report)
        except KvchatError as error:
            self._report(Refused(str(error)))
        except Exception as error:  # as in a turn
            traceback.print_exc()
            self._report(Refused(f"The engine failed: {type(error).__name__}: {error}"))
        self._report(self.pool())

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache, in memory and on disk."""
        self.caches.forget(conversation)

    def close(self) -> None:
        """Saves what is not saved, and frees every cache."""
        self.caches.close()

    def pool(self) -> PoolState:
        """Every cache there is, and what happened to them since the last time."""
        events = tuple(self._events)
        del self._events[: len(events)]  # the saving thread may have added one meanwhile
        return self.caches.state(events)

    def _note_saved(self, result: SaveResult) -> None:
        """Called from the saving thread."""
        kind = CacheEventKind.REFUSE if result.error else CacheEventKind.SAVE
        self._tell(kind, result.conversation, 0, size=result.bytes, seconds=result.seconds, note=result.error)
        for other in result.removed:
            self._tell(CacheEventKind.DROP, other, 0, note="removed from disk: its cap was reached")

    def _answer(self, request: TurnRequest, meter: Meter) -> Iterator[TurnEvent]:
        plan = self.planner.plan(request)
        kept, plan = self._take(request, plan, meter)
        # after an eviction that left a gap, the model sees fewer tokens than the conversation has
        meter.reused_tokens = len(kept.kv)
        meter.prompt_tokens = meter.reused_tokens + len(plan.unread)
        meter.reuse_note = plan.note
        kept.messages, kept.left_out, kept.remember = plan.messages, plan.left_out, request.remember
        system = plan.messages[0].role == "system"
        kept.system_end = plan.rendered.ends[0] if system else 0
        self._tell_of_reuse(request, plan)
        yield TurnStarted(
            request.turn,
            meter.prompt_tokens,
            meter.reused_tokens,
            len(plan.unread),
            plan.note,
            plan.miss,
            meter.restored_tokens,
        )
        if plan.evicted_tokens:
            yield self._evicted(request, plan.evicted_tokens, plan, meter)
        turn = Turn(request, plan, kept, self._reader(request.mode, kept), meter, Answer([]))
        try:
            yield from self._generate(turn)
        except Stopped:
            turn.answer.finish = FinishReason.CANCELLED
        yield self._finish(turn)

    def _finish(self, turn: Turn) -> TurnFinished:
        request, kept, answer, plan = turn.request, turn.kept, turn.answer, turn.plan
        ids = tuple(i for i in answer.ids if i not in self._loaded.end_ids)
        said = PromptMessage("assistant", answer.text, ids, self.facts.tokenizer)
        kept.messages = answered(plan.messages, said)
        kept.last_used = time.time()
        kept.kv.mark()
        stats = turn.meter.stats(
            request.mode,
            replace(self.facts, context_limit=plan.limit, kv_dtype=kept.precision.value),
            answer.finish,
            evaluated=turn.reader.evaluated,
            kv_tokens=len(kept.kv),
            kv_bytes=kept.kv.storage_bytes,
            kv_used_bytes=kept.kv.used_bytes,
        )
        if request.mode is CacheMode.ON:
            self.caches.save(request.conversation)
        else:
            self.caches.discard(request.conversation, explain.WHEN_DISCARDED[request.mode])
        return TurnFinished(
            request.turn, answer.text, ids, self.facts.tokenizer, stats, self.pool(), plan.left_out
        )

    def _take(self, request: TurnRequest, plan: Plan, meter: Meter) -> tuple[Kept, Plan]:
        """The cache that the turn starts from, cropped to what it reuses."""
        source, conversation = plan.source, request.conversation
        if isinstance(source, Saved):
            try:
                return self._restored(request, plan, source, meter), plan
            except KvchatError as error:
                self._tell(CacheEventKind.REFUSE, conversation, 0, note=str(error))
                self.caches.why_gone[conversation] = str(error)
                self._remove_saved(conversation)
                return self._take(request, self.planner.plan(request), meter)
        if isinstance(source, Lent):
            return self._lent(request, plan, source), plan
        kept = self.caches.get(conversation)
        if request.mode is not CacheMode.ON or kept is None or not self.planner.fits(kept, request.kv):
            if kept:
                kept.kv.clear()
            kept = self.caches.put(conversation, self.caches.empty(request.kv))
        kept.kv.truncate(plan.reused)
        kept.prefix_only = False
        return kept, plan

    def _restored(self, request: TurnRequest, plan: Plan, saved: Saved, meter: Meter) -> Kept:
        """The cache from disk, verified, in memory of its own."""
        assert self._disk is not None
        started = time.perf_counter()
        kept = self.caches.restore(request.conversation, saved, request.kv)
        meter.restore_s = time.perf_counter() - started
        kept.kv.truncate(plan.reused)
        meter.restored_tokens = len(kept.kv)
        return kept

    def _lent(self, request: TurnRequest, plan: Plan, source: Lent) -> Kept:
        lender = self.caches.get(source.lender)
        assert lender is not None
        kept = self.caches.empty(request.kv)
        kept.kv = lender.kv.fork(plan.reused)
        self._tell(CacheEventKind.LEND, request.conversation, plan.reused, note=f"from {source.lender}")
        return self.caches.put(request.conversation, kept)

    def _remove_saved(self, conversation: str) -> None:
        if self._disk:
            self._disk.remove(conversation)

    def _generate(self, turn: Turn) -> Iterator[TurnEvent]:
        """Prefill, then one token at a time until something ends the turn."""
        request, answer = turn.request, turn.answer
        logits = yield from self._prefill(turn)
        goes_on = request.messages[-1].role == "assistant"
        before = turn.plan.rendered.ids[-CONTEXT_OF_TEXT:] if goes_on else ()
        sampler, detokenizer = Sampler(request.sampling), Detokenizer(self._loaded.tokenizer, before)
        while True:
            token = sampler.choose(logits, turn.tokens if sampler.reads_context else ())
            answer.ids.append(token)
            text = "" if token in self._loaded.end_ids else detokenizer.step(token)
            answer.text += text
            took = turn.meter.token(text)
            if token in self._loaded.end_ids:
                return
            kv = turn.kept.kv
            yield Tokens(
                request.turn, text, (token,), (took,), self.facts.tokenizer, len(kv), kv.storage_bytes
            )
            if end := self._end(turn):
                answer.finish = end
                return
            if turn.filled >= turn.plan.limit:
                rest = yield from self._make_context(turn)
                if not rest:
                    answer.finish = FinishReason.CONTEXT
                    return
                logits = self._read(turn, rest)
            else:
                logits = self._read(turn, [token])

    def _prefill(self, turn: Turn) -> Generator[TurnEvent, None, torch.Tensor]:
        """Reads what the cache doesn't hold; returns the logits that choose the first token."""
        request, meter = turn.request, turn.meter
        meter.begin_prefill()
        unread = turn.plan.unread
        # half of the context is what an eviction makes room for
        chunk = min(self._prefill_chunk, max(1, turn.plan.limit // 2) if turn.leaves_gaps else sys.maxsize)
        ends = [*range(chunk, len(unread), chunk), len(unread)]
        if request.mode is CacheMode.OFF:
            ends = [len(unread)]
        elif turn.kept.kv.states and len(unread) > 1:
            # where only marks can be gone back to, one before the last token serves every regeneration
            ends = [*(e for e in ends if e < len(unread) - 1), len(unread) - 1, len(unread)]
        done = 0
        for end in ends:
            if turn.leaves_gaps and len(turn.kept.kv) + end - done > turn.plan.limit:
                yield from self._evict_rows(turn)
                self._check_fits(turn, end - done)
            if end == len(unread):
                turn.kept.kv.mark()
            logits = self._read(turn, unread[done:end])
            done = end
            meter.read(done)
            if len(ends) > 1 + bool(turn.kept.kv.states):
                yield PrefillProgress(request.turn, done, len(unread))
        self.rate.note(meter.prefill_read, meter.prefill_s)
        reserve = min(request.sampling.max_tokens, turn.plan.limit // 8)
        if turn.leaves_gaps and len(turn.kept.kv) + reserve > turn.plan.limit:
            yield from self._evict_rows(turn)
        return logits

    def _read(self, turn: Turn, ids: Sequence[int]) -> torch.Tensor:
        """One forward pass, after its memory was made room for."""
        if turn.request.mode is not CacheMode.OFF:
            self.caches.make_room(lambda: turn.kept.kv.bytes_to_read(len(ids)))
            self._unshare(turn, len(ids))
            if turn.leaves_gaps and (room := keep_positions(self._loaded, turn.kept.kv, len(ids))):
                turn.reader.evaluated += room.reread
                self._tell(CacheEventKind.EVICT, turn.request.conversation, 0, note=room.note)
        return turn.reader.read(ids)

    def _unshare(self, turn: Turn, tokens: int) -> None:
        """The first write into memory that a fork shares copies it; the timeline says what that took."""
        kv, started = turn.kept.kv, time.perf_counter()
        if copied := kv.unshare(tokens):
            took = time.perf_counter() - started
            note = "copied out of the memory it shared"
            conversation = turn.request.conversation
            self._tell(CacheEventKind.FORK, conversation, len(kv), size=copied, seconds=took, note=note)

    def _make_context(self, turn: Turn) -> Generator[TurnEvent, None, list[int]]:
        """The answer has filled the context: drops what the policy lets go; returns the tokens to read next.

        Nothing is returned where nothing may be dropped.
        """
        request, answer = turn.request, turn.answer
        if turn.leaves_gaps:
            before = len(turn.kept.kv)
            yield from self._evict_rows(turn)
            return answer.ids[-1:] if len(turn.kept.kv) < before else []
        if request.policy is not EvictionPolicy.TURNS:
            return []
        left_out = self.planner.more_to_leave_out(request, turn.plan, len(answer.ids))
        if left_out == turn.plan.left_out:
            return []
        messages, rendered = self.planner.rendered(request, left_out)
        if len(rendered.ids) + len(answer.ids) >= turn.plan.limit:
            return []
        dropped = len(turn.plan.rendered.ids) - len(rendered.ids)
        turn.plan = replace(turn.plan, messages=messages, rendered=rendered, left_out=left_out)
        yield self._evicted(request, dropped, turn.plan, turn.meter)
        turn.kept.messages, turn.kept.left_out = messages, left_out
        if request.mode is CacheMode.OFF:
            turn.reader = UncachedReader(self._loaded.model, turn.reader.evaluated)
            return turn.tokens
        kv, wanted = turn.kept.kv, turn.tokens
        kv.truncate(self.planner.reusable(kv, wanted))
        rest = wanted[len(kv.ids) :]
        for start in range(0, len(rest) - 1, self._prefill_chunk):
            self._read(turn, rest[start : min(start + self._prefill_chunk, len(rest) - 1)])
        return rest[-1:]

    def _check_fits(self, turn: Turn, tokens: int) -> None:
        """Raises `KvchatError` where the policy could not let go of enough to read so many tokens."""
        if len(turn.kept.kv) + tokens > turn.plan.limit:
            raise KvchatError(
                f"What {turn.request.policy} may not drop and the next {tokens:,} tokens are more than "
                f"{turn.plan.limit:,}. Send a shorter message, or choose another policy with /policy."
            )

    def _evict_rows(self, turn: Turn) -> Iterator[Evicted]:
        request, kept = turn.request, turn.kept
        prompt = layout_of(turn.plan.messages, turn.plan.rendered)
        limit = turn.plan.limit
        room: Room = evict_rows(self._loaded, kept.kv, request.policy.value, prompt, limit)
        turn.reader.evaluated += room.reread
        turn.meter.evicted_tokens += room.tokens
        if room.tokens:
            self._tell(CacheEventKind.EVICT, request.conversation, room.tokens, note=room.note)
            yield Evicted(request.turn, room.tokens, room.note, turn.plan.left_out)

    def _evicted(self, request: TurnRequest, tokens: int, plan: Plan, meter: Meter) -> Evicted:
        meter.evicted_tokens += tokens
        note = f"the {plan.left_out} oldest messages are left out; what stays is read again: exact"
        self._tell(CacheEventKind.EVICT, request.conversation, tokens, note=note)
        return Evicted(request.turn, tokens, note, plan.left_out)

    def _end(self, turn: Turn) -> FinishReason | None:
        if self._is_stopped(turn.request.turn):
            return FinishReason.CANCELLED
        if len(turn.answer.ids) >= turn.request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _is_stopped(self, turn: str) -> bool:
        return self._closing or self._stopped_turn == turn

    def _reader(self, mode: CacheMode, kept: Kept) -> Reader:
        if mode is CacheMode.OFF:
            return UncachedReader(self._loaded.model)
        return CachedReader(self._loaded.model, kept.kv)

    def _tell_of_reuse(self, request: TurnRequest, plan: Plan) -> None:
        if plan.miss:
            note = explain.sentence(plan.miss)
            self._tell(CacheEventKind.MISS, request.conversation, plan.miss.tokens, note=note)
        if plan.reused:
            self._tell(CacheEventKind.REUSE, request.conversation, plan.reused)

    def _tell(
        self,
        kind: CacheEventKind,
        conversation: str,
        tokens: int,
        *,
        size: int = 0,
        seconds: float = 0.0,
        note: str = "",
    ) -> None:
        self._events.append(CacheEvent(conversation, kind, tokens, size, seconds, note, time.time()))
