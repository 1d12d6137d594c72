"""The engine: answers turns, one at a time, with one KV cache per conversation.

Every turn follows one rule: render the whole conversation, find the longest common prefix with the cache,
crop the cache to it, prefill the rest, generate. Editing, regenerating, undoing, continuing, forking or
changing the system prompt need nothing else. Must not depend on stored conversations, only on their ids.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kvchat.cache.disk.disk_store import DiskStore
from kvchat.cache.disk.writer import SaveResult
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
from kvchat.engine.cache_commands import execute
from kvchat.engine.cache_manager import Caches, ResidentCache
from kvchat.engine.cache_source import SharedPrefix
from kvchat.engine.disk_tier import DiskTier, SavedCache
from kvchat.engine.event_log import EventLog
from kvchat.engine.eviction import leaves_gap
from kvchat.engine.model.fingerprint import identify
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.planner import Planner, TurnPlan
from kvchat.engine.prompt import Renderer
from kvchat.engine.sampler import NotANumberError, Sampler
from kvchat.engine.speculative import Drafter, PromptLookup
from kvchat.engine.token_spans import spans_at_end, spans_at_start
from kvchat.engine.turn import PREFILL_CHUNK, EngineServices, Turn
from kvchat.engine.turn_timer import TurnTimer
from kvchat.errors import KvchatError, as_sentence, cause

log = logging.getLogger(__name__)

UNBOUNDED = 1 << 62
"""No limit."""


def answered(messages: Sequence[PromptMessage], answer: PromptMessage) -> tuple[PromptMessage, ...]:
    """The conversation with its answer, joined to one that an earlier turn began."""
    begun = messages[-1]
    if begun.role != "assistant":
        return (*messages, answer)
    ids = (*begun.token_ids, *answer.token_ids)
    return (*messages[:-1], replace(answer, text=begun.text + answer.text, token_ids=ids))


def _failure(error: Exception) -> str:
    """The sentence for an error; an unexpected one is logged with its traceback."""
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
    """Runs a loaded model in this process; implements `contract.Engine`."""

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
        """`report` gets the results of cache commands; each turn uses a new drafter and a new sampler."""
        self.facts = loaded.facts
        self._loaded = loaded
        self._disk = disk
        self._report = report
        self._event_log = EventLog()
        frequencies = loaded.shape.rotary_frequencies
        fingerprint = identify(loaded.facts, loaded.revision, loaded.template, frequencies)
        if disk:
            disk.on_saved = self._log_save
        self.caches = Caches(loaded.new_kv, fingerprint, budget_bytes, disk, self._event_log)
        renderer = Renderer(loaded.tokenizer, loaded.template, loaded.facts.tokenizer)
        self.planner = Planner(loaded.facts, renderer, self.caches, disk)
        self._services = EngineServices(
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
        """Answers a turn; every failure becomes a `TurnFailed`, and the cache stays consistent."""
        timer = TurnTimer()
        self.caches.active = request.conversation
        try:
            with self._loaded.stopping(lambda: self._is_stopped(request.turn)):
                yield from self._answer(request, timer)
        except KvchatError as error:
            self._discard_what_failed(request, timer, error)
            yield TurnFailed(request.turn, str(error))
        except Exception as error:  # no failure of one turn ends the engine
            self._discard_what_failed(request, timer, error)
            yield TurnFailed(request.turn, _failure(error))

    def stop(self, turn: str) -> None:
        """Ends that turn before the next layer is computed."""
        self._stopped_turn = turn

    def stop_all(self) -> None:
        """Ends the current turn and every later one, because the engine is closing."""
        self._closing = True

    def command(self, command: CacheCommand) -> None:
        """Executes a cache command and reports its results."""
        try:
            for report in execute(command, self.caches, self.planner, self._loaded, self._disk):
                self._report(report)
        except KvchatError as error:
            self._report(Refused(str(error)))
        except Exception as error:  # as in a turn
            self._report(Refused(_failure(error)))
        if not isinstance(command, CountTokens):
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
        """All caches, and the events since the last call."""
        return self.caches.state(self._event_log.take())

    def _log_save(self, result: SaveResult) -> None:
        """Called from the writer's thread."""
        kind = CacheEventKind.REFUSE if result.error else CacheEventKind.SAVE
        took, size = result.seconds, result.bytes
        conversation, note = result.conversation, result.error
        self._event_log.log(conversation, kind, result.tokens, size=size, seconds=took, note=note)
        for other in result.removed:
            self._event_log.log(other, CacheEventKind.DROP, 0, note="removed from disk: the cap was reached")

    def _answer(self, request: TurnRequest, timer: TurnTimer) -> Iterator[TurnEvent]:
        plan = self.planner.plan(request)
        cache, plan = self._take(request, plan, timer)
        # after an eviction that left a gap, fewer tokens are visible to the model than the prompt has
        timer.reused_tokens = len(cache.kv)
        timer.prompt_tokens = timer.reused_tokens + len(plan.unread)
        timer.reuse_note = plan.note
        cache.messages, cache.evicted_messages = plan.messages, plan.evicted_messages
        cache.persist = request.persist
        system = plan.messages[0].role == "system"
        cache.system_end = plan.rendered.ends[0] if system else 0
        if plan.miss:
            note = miss_reason.sentence(plan.miss)
            self._event_log.log(request.conversation, CacheEventKind.MISS, plan.miss.tokens, note=note)
        if plan.reused:
            self._event_log.log(request.conversation, CacheEventKind.REUSE, plan.reused)
        yield TurnStarted(
            request.turn,
            timer.prompt_tokens,
            timer.reused_tokens,
            len(plan.unread),
            plan.note,
            plan.miss,
            timer.restored_tokens,
            spans_at_start(request, plan, cache.kv),
        )
        turn = Turn(self._services, request, plan, cache, timer)
        yield from turn.run()
        yield self._finish(turn, plan)

    def _discard_what_failed(self, request: TurnRequest, timer: TurnTimer, error: Exception) -> None:
        """Frees a cache that later turns must not use; an earlier save stays on disk."""
        if isinstance(error, NotANumberError):
            self.caches.discard(request.conversation, miss_reason.NOT_A_NUMBER)
        elif leaves_gap(request.policy) and timer.evicted_tokens and not timer.generated:
            # rows were evicted for a message without an answer, which later turns don't contain
            self.caches.discard(request.conversation, miss_reason.FAILED_AFTER_EVICTION)

    def _finish(self, turn: Turn, planned: TurnPlan) -> TurnFinished:
        request, cache, answer, plan = turn.request, turn.cache, turn.answer, turn.plan
        ids = tuple(i for i in answer.ids if i not in self._loaded.end_ids)
        message = PromptMessage("assistant", answer.text, ids, self.facts.tokenizer)
        cache.messages = answered(plan.messages, message)
        cache.last_used = time.time()
        cache.kv.checkpoint()
        stats = turn.timer.stats(
            request.mode,
            replace(self.facts, context_limit=plan.limit, kv_dtype=cache.precision.value),
            answer.finish,
            evaluated=turn.reader.evaluated,
            kv_tokens=len(cache.kv),
            kv_bytes=cache.kv.storage_bytes,
            kv_used_bytes=cache.kv.used_bytes,
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

    def _take(self, request: TurnRequest, plan: TurnPlan, timer: TurnTimer) -> tuple[ResidentCache, TurnPlan]:
        """The cache that the turn starts from, cropped to the reused tokens."""
        source, conversation = plan.source, request.conversation
        if isinstance(source, SavedCache):
            try:
                return self._restored(request, plan, source, timer), plan
            except KvchatError as error:
                self._event_log.log(conversation, CacheEventKind.REFUSE, 0, note=str(error))
                self.caches.drop_reasons[conversation] = str(error)
                if self._disk:
                    self._disk.refuse(conversation, str(error))
                return self._take(request, self.planner.plan(request), timer)
        if isinstance(source, SharedPrefix):
            shared = self.caches.share_prefix(conversation, source.conversation, plan.reused, request.kv)
            return shared, plan
        cache = self.caches.get(conversation)
        if (
            request.mode is not CacheMode.ON
            or cache is None
            or not self.caches.is_stored_as(cache, request.kv)
        ):
            if cache:
                cache.kv.clear()
            cache = self.caches.put(conversation, self.caches.empty(request.kv))
        cache.kv.truncate(plan.reused)
        cache.prefix_only = False
        return cache, plan

    def _restored(
        self, request: TurnRequest, plan: TurnPlan, saved: SavedCache, timer: TurnTimer
    ) -> ResidentCache:
        """The cache loaded from disk."""
        assert self._disk is not None
        started = time.perf_counter()
        cache = self.caches.restore(request.conversation, saved, request.kv)
        timer.restore_s = time.perf_counter() - started
        cache.kv.truncate(plan.reused)
        timer.restored_tokens = len(cache.kv)
        return cache

    def _is_stopped(self, turn: str) -> bool:
        return self._closing or self._stopped_turn == turn
