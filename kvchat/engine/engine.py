"""The engine: answers turns, one at a time, and keeps one KV cache per conversation.

Every turn is one rule: render the whole conversation, find the longest common prefix with what the cache
holds, crop to it, read the rest, generate. Editing, regenerating, undoing, continuing, forking or changing
the system prompt need nothing else. It knows conversations by id only; what they are called and where their
texts are stored is elsewhere.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kvchat.cache.disk.disk_store import DiskStore
from kvchat.cache.disk.writer import SaveResult
from kvchat.cache.eviction import POLICIES
from kvchat.contract import (
    CacheCommand,
    CacheEventKind,
    CacheMode,
    CountTokens,
    KVPrecision,
    PoolState,
    PromptMessage,
    Refused,
    Report,
    Sampling,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from kvchat.engine import miss_reason
from kvchat.engine.cache_commands import do
from kvchat.engine.cache_manager import Caches, ResidentCache
from kvchat.engine.disk_tier import DiskTier, SavedCache
from kvchat.engine.event_log import EventLog
from kvchat.engine.model.fingerprint import identify
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.planner import Planner, Rate, SharedPrefix, TurnPlan
from kvchat.engine.prompt import Renderer
from kvchat.engine.sampler import NotANumberError, Sampler
from kvchat.engine.speculative import Drafter, PromptLookup
from kvchat.engine.token_spans import spans_at_end, spans_at_start
from kvchat.engine.turn import PREFILL_CHUNK, Tools, Turn
from kvchat.engine.turn_timer import TurnTimer
from kvchat.errors import KvchatError, as_sentence, cause

log = logging.getLogger(__name__)

UNBOUNDED = 1 << 62
"""A budget that nothing reaches."""


def answered(messages: Sequence[PromptMessage], said: PromptMessage) -> tuple[PromptMessage, ...]:
    """The conversation with its answer, which may have been begun in an earlier turn."""
    begun = messages[-1]
    if begun.role != "assistant":
        return (*messages, said)
    ids = (*begun.token_ids, *said.token_ids)
    return (*messages[:-1], replace(said, text=begun.text + said.text, token_ids=ids))


def _failure(error: Exception) -> str:
    """The sentence for an error; the log gets the traceback of one that is not a file's or a library's."""
    if cause(error) is None:
        log.error("the engine failed", exc_info=error)
    return f"The engine failed: {as_sentence(error)}"


@contextmanager
def _opened(folder: Path, cap_bytes: int) -> Iterator[DiskTier]:
    """Saved caches in a folder of their own."""
    disk = DiskTier(DiskStore(folder, cap_bytes))
    try:
        yield disk
    finally:
        disk.close()


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
        new_drafter: Callable[[], Drafter | None] = PromptLookup,
        new_sampler: Callable[[Sampling], Sampler] = Sampler,
    ) -> None:
        """`report` gets what came of an act.

        `new_drafter` makes what guesses ahead in one turn, `new_sampler` what chooses its tokens.
        """
        self.facts = loaded.facts
        self._loaded = loaded
        self._disk = disk
        self._report = report
        self._event_log = EventLog()
        frequencies = loaded.shape.rotary_frequencies
        fingerprint = identify(loaded.facts, loaded.revision, loaded.template, frequencies)
        if disk:
            disk.on_saved = self._note_saved
        self.caches = Caches(loaded.new_kv, fingerprint, budget_bytes, disk, self._event_log)
        renderer = Renderer(loaded.tokenizer, loaded.template, loaded.facts.tokenizer)
        self.planner = Planner(loaded.facts, renderer, self.caches, disk, Rate())
        self._tools = Tools(
            loaded,
            self.caches,
            self.planner,
            self._event_log,
            prefill_chunk,
            self._is_stopped,
            new_drafter,
            new_sampler,
        )
        self._stopped_turn = ""
        self._closing = False

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Answers; every failure becomes a `TurnFailed`, and the cache stays consistent."""
        meter = TurnTimer()
        self.caches.active = request.conversation
        try:
            with self._loaded.stopping(lambda: self._is_stopped(request.turn)):
                yield from self._answer(request, meter)
        except KvchatError as error:
            self._discard_what_failed(request, meter, error)
            yield TurnFailed(request.turn, str(error))
        except Exception as error:  # the engine outlives whatever a model or the memory does to one turn
            self._discard_what_failed(request, meter, error)
            yield TurnFailed(request.turn, _failure(error))

    def stop(self, turn: str) -> None:
        """Ends that turn before the next layer is computed."""
        self._stopped_turn = turn

    def stop_all(self) -> None:
        """Ends whatever turn runs, and every later one: nobody listens any more."""
        self._closing = True

    def command(self, act: CacheCommand) -> None:
        """Does something to the caches and reports what came of it."""
        try:
            for report in do(act, self.caches, self.planner, self._loaded, self._disk):
                self._report(report)
        except KvchatError as error:
            self._report(Refused(str(error)))
        except Exception as error:  # as in a turn
            self._report(Refused(_failure(error)))
        if not isinstance(act, CountTokens):
            self._report(self.pool())

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache, in memory and on disk."""
        self.caches.forget(conversation)
        self._report(self.pool())

    def close(self) -> None:
        """Saves what is not saved, and frees every cache."""
        self.caches.close()

    def save_cache(self, conversation: str, folder: Path, cap_bytes: int) -> None:
        """Saves a copy of a conversation's cache in `folder`; where there is none in memory, removes that.

        Args:
            cap_bytes: that all saved caches in the folder may take.

        Raises:
            KvchatError: it can't be saved.
        """
        with _opened(folder, cap_bytes) as disk:
            self.caches.save_copy(conversation, disk)

    def load_cache(self, conversation: str, folder: Path, kv: KVPrecision) -> None:
        """Brings a cache that `save_cache` saved in `folder` into memory.

        Where it is damaged or doesn't fit this model, the next turn reads the conversation, and says why.
        """
        with _opened(folder, UNBOUNDED) as disk:
            try:
                if saved := disk.find(conversation):
                    self.caches.restore(conversation, saved, kv, disk)
            except KvchatError as error:
                self.caches.drop_reasons[conversation] = str(error)

    def pool(self) -> PoolState:
        """Every cache there is, and what happened to them since the last time."""
        return self.caches.state(self._event_log.take())

    def _note_saved(self, result: SaveResult) -> None:
        """Called from the saving thread."""
        kind = CacheEventKind.REFUSE if result.error else CacheEventKind.SAVE
        took, size = result.seconds, result.bytes
        conversation, note = result.conversation, result.error
        self._event_log.log(conversation, kind, result.tokens, size=size, seconds=took, note=note)
        for other in result.removed:
            self._event_log.log(other, CacheEventKind.DROP, 0, note="removed from disk: its cap was reached")

    def _answer(self, request: TurnRequest, meter: TurnTimer) -> Iterator[TurnEvent]:
        plan = self.planner.plan(request)
        kept, plan = self._take(request, plan, meter)
        # after an eviction that left a gap, the model sees fewer tokens than the conversation has
        meter.reused_tokens = len(kept.kv)
        meter.prompt_tokens = meter.reused_tokens + len(plan.unread)
        meter.reuse_note = plan.note
        kept.messages, kept.evicted_messages, kept.persist = (
            plan.messages,
            plan.evicted_messages,
            request.persist,
        )
        system = plan.messages[0].role == "system"
        kept.system_end = plan.rendered.ends[0] if system else 0
        self._log_reuse(request, plan)
        yield TurnStarted(
            request.turn,
            meter.prompt_tokens,
            meter.reused_tokens,
            len(plan.unread),
            plan.note,
            plan.miss,
            meter.restored_tokens,
            spans_at_start(request, plan, kept.kv),
        )
        turn = Turn(self._tools, request, plan, kept, meter)
        yield from turn.run()
        yield self._finish(turn, plan)

    def _discard_what_failed(self, request: TurnRequest, meter: TurnTimer, error: Exception) -> None:
        """Frees a cache that later turns must not use; what was saved after an earlier turn stays on disk."""
        leaves_gap = POLICIES[request.policy.value].leaves_gap
        if isinstance(error, NotANumberError):
            self.caches.discard(request.conversation, miss_reason.NOT_A_NUMBER)
        elif leaves_gap and meter.evicted_tokens and not meter.generated:
            # no answer came of it: later turns don't lose rows for a message that they don't see
            self.caches.discard(request.conversation, miss_reason.FAILED_AFTER_EVICTION)

    def _finish(self, turn: Turn, planned: TurnPlan) -> TurnFinished:
        request, kept, answer, plan = turn.request, turn.kept, turn.answer, turn.plan
        ids = tuple(i for i in answer.ids if i not in self._loaded.end_ids)
        said = PromptMessage("assistant", answer.text, ids, self.facts.tokenizer)
        kept.messages = answered(plan.messages, said)
        kept.last_used = time.time()
        kept.kv.checkpoint()
        stats = turn.meter.stats(
            request.mode,
            replace(self.facts, context_limit=plan.limit, kv_dtype=kept.precision.value),
            answer.finish,
            evaluated=turn.reader.evaluated,
            kv_tokens=len(kept.kv),
            kv_bytes=kept.kv.storage_bytes,
            kv_used_bytes=kept.kv.used_bytes,
        )
        spans = spans_at_end(turn, planned)
        if request.mode is CacheMode.ON:
            self.caches.save(request.conversation)
        else:
            self.caches.discard(request.conversation, miss_reason.WHEN_DISCARDED[request.mode])
        return TurnFinished(
            request.turn,
            answer.text,
            ids,
            self.facts.tokenizer,
            stats,
            self.pool(),
            plan.evicted_messages,
            spans,
        )

    def _take(self, request: TurnRequest, plan: TurnPlan, meter: TurnTimer) -> tuple[ResidentCache, TurnPlan]:
        """The cache that the turn starts from, cropped to what it reuses."""
        source, conversation = plan.source, request.conversation
        if isinstance(source, SavedCache):
            try:
                return self._restored(request, plan, source, meter), plan
            except KvchatError as error:
                self._event_log.log(conversation, CacheEventKind.REFUSE, 0, note=str(error))
                self.caches.drop_reasons[conversation] = str(error)
                if self._disk:
                    self._disk.refuse(conversation, str(error))
                return self._take(request, self.planner.plan(request), meter)
        if isinstance(source, SharedPrefix):
            return self._with_shared_prefix(request, plan, source), plan
        kept = self.caches.get(conversation)
        if request.mode is not CacheMode.ON or kept is None or not self.planner.fits(kept, request.kv):
            if kept:
                kept.kv.clear()
            kept = self.caches.put(conversation, self.caches.empty(request.kv))
        kept.kv.truncate(plan.reused)
        kept.prefix_only = False
        return kept, plan

    def _restored(
        self, request: TurnRequest, plan: TurnPlan, saved: SavedCache, meter: TurnTimer
    ) -> ResidentCache:
        """The cache from disk, verified, in memory of its own."""
        assert self._disk is not None
        started = time.perf_counter()
        kept = self.caches.restore(request.conversation, saved, request.kv)
        meter.restore_s = time.perf_counter() - started
        kept.kv.truncate(plan.reused)
        meter.restored_tokens = len(kept.kv)
        return kept

    def _with_shared_prefix(
        self, request: TurnRequest, plan: TurnPlan, source: SharedPrefix
    ) -> ResidentCache:
        lender = self.caches.get(source.lender)
        assert lender is not None
        kept = self.caches.empty(request.kv)
        kept.kv = lender.kv.fork(plan.reused)
        self._event_log.log(
            request.conversation, CacheEventKind.SHARE, plan.reused, note=f"from {source.lender}"
        )
        return self.caches.put(request.conversation, kept)

    def _is_stopped(self, turn: str) -> bool:
        return self._closing or self._stopped_turn == turn

    def _log_reuse(self, request: TurnRequest, plan: TurnPlan) -> None:
        if plan.miss:
            note = miss_reason.sentence(plan.miss)
            self._event_log.log(request.conversation, CacheEventKind.MISS, plan.miss.tokens, note=note)
        if plan.reused:
            self._event_log.log(request.conversation, CacheEventKind.REUSE, plan.reused)
