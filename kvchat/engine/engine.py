"""The engine: answers turns, one at a time, and keeps one KV cache per conversation.

Every turn is one rule: render the whole conversation, find the longest common prefix with what the cache
holds, crop to it, read the rest, generate. Editing, regenerating, undoing or changing the system prompt need
nothing else. It knows conversations by id only; what they are called and where they are stored is elsewhere.
"""

import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from kvchat.cache.kv import ConversationKV
from kvchat.cache.prefix import plan_reuse
from kvchat.contract import (
    CacheMode,
    FinishReason,
    PrefillProgress,
    PromptMessage,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    WarmCache,
)
from kvchat.engine import explain
from kvchat.engine.detokenize import Detokenizer
from kvchat.engine.forward import (
    CachedReader,
    Reader,
    Stopped,
    UncachedReader,
    stopping_between_layers,
)
from kvchat.engine.load import LoadedModel
from kvchat.engine.meter import Meter
from kvchat.engine.render import Renderer
from kvchat.engine.sample import Sampler
from kvchat.errors import KvchatError

PREFILL_CHUNK = 512
"""Tokens read between two looks at the clock, two progress events and two commits."""


@dataclass(slots=True)
class Kept:
    """A conversation's cache and the messages it was read from."""

    kv: ConversationKV
    messages: Sequence[PromptMessage] = ()


@dataclass(slots=True)
class Answer:
    """What one turn has produced so far."""

    ids: list[int]
    text: str = ""
    finish: FinishReason = FinishReason.STOP


class LocalEngine:
    """Runs a loaded model in this process; satisfies `contract.Engine`."""

    def __init__(self, loaded: LoadedModel, *, prefill_chunk: int = PREFILL_CHUNK) -> None:
        self.facts = loaded.facts
        self._loaded = loaded
        self._renderer = Renderer(loaded.tokenizer, loaded.chat, loaded.facts.tokenizer)
        self._prefill_chunk = prefill_chunk
        self._kept: dict[str, Kept] = {}
        self._why_empty: dict[str, str] = {}
        self._stopped_turn = ""
        self._closing = False

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Answers; every failure becomes a `TurnFailed`, and the cache stays consistent."""
        meter = Meter()
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

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache."""
        self._kept.pop(conversation, None)
        self._why_empty.pop(conversation, None)

    def close(self) -> None:
        """Frees every cache."""
        self._kept.clear()

    def warm(self) -> tuple[WarmCache, ...]:
        """The conversations whose cache is in memory."""
        return tuple(
            WarmCache(name, len(kept.kv), kept.kv.storage_bytes)
            for name, kept in self._kept.items()
            if kept.kv
        )

    def _answer(self, request: TurnRequest, meter: Meter) -> Iterator[TurnEvent]:
        prompt = self._renderer.render(request.messages)
        self._refuse_too_long(prompt)
        kept = self._cache_for(request)
        reuse = plan_reuse(kept.kv.ids, prompt)
        meter.prompt_tokens, meter.reused_tokens = len(prompt), reuse.reused
        meter.reuse_note = self._explain(
            request, kept, dropped=reuse.reused < min(len(kept.kv), len(prompt) - 1)
        )
        kept.kv.truncate(reuse.reused)
        kept.messages = request.messages
        yield TurnStarted(request.turn, len(prompt), reuse.reused, reuse.prefilled, meter.reuse_note)

        reader = self._reader(request.mode, kept.kv)
        answer = Answer([])
        try:
            yield from self._generate(request, prompt, reader, meter, answer, kept.kv)
        except Stopped:
            answer.finish = FinishReason.CANCELLED
        kept.messages = (*request.messages, PromptMessage("assistant", answer.text))
        stats = meter.stats(
            request.mode,
            self.facts,
            answer.finish,
            evaluated=reader.evaluated,
            kv_tokens=len(kept.kv),
            kv_bytes=kept.kv.storage_bytes,
            kv_used_bytes=kept.kv.used_bytes,
        )
        ids = tuple(i for i in answer.ids if i not in self._loaded.end_ids)
        yield TurnFinished(request.turn, answer.text, ids, self.facts.tokenizer, stats, self.warm())

    def _generate(
        self,
        request: TurnRequest,
        prompt: Sequence[int],
        reader: Reader,
        meter: Meter,
        answer: Answer,
        kv: ConversationKV,
    ) -> Iterator[TurnEvent]:
        """Prefill, then one token at a time until something ends the turn."""
        logits = yield from self._prefill(request, prompt, reader, meter)
        sampler, detokenizer = Sampler(request.sampling), Detokenizer(self._loaded.tokenizer)
        while True:
            token = sampler.choose(logits, [*prompt, *answer.ids] if sampler.reads_context else ())
            answer.ids.append(token)
            text = "" if token in self._loaded.end_ids else detokenizer.step(token)
            answer.text += text
            took = meter.token(text)
            if token in self._loaded.end_ids:
                return
            yield Tokens(
                request.turn, text, (token,), (took,), self.facts.tokenizer, len(kv), kv.storage_bytes
            )
            if end := self._end(request, prompt, answer):
                answer.finish = end
                return
            logits = reader.read([token])

    def _prefill(
        self, request: TurnRequest, prompt: Sequence[int], reader: Reader, meter: Meter
    ) -> Generator[TurnEvent, None, torch.Tensor]:
        """Reads what the cache doesn't hold; returns the logits that choose the first token."""
        meter.begin_prefill()
        uncached = request.mode is CacheMode.OFF
        unread = prompt if uncached else prompt[meter.reused_tokens :]
        chunk = len(unread) if uncached else self._prefill_chunk
        for start in range(0, len(unread), chunk):
            logits = reader.read(unread[start : start + chunk])
            done = min(start + chunk, len(unread))
            meter.read(done)
            if len(unread) > chunk:
                yield PrefillProgress(request.turn, done, len(unread))
        return logits

    def _end(self, request: TurnRequest, prompt: Sequence[int], answer: Answer) -> FinishReason | None:
        if self._is_stopped(request.turn):
            return FinishReason.CANCELLED
        if len(answer.ids) >= request.sampling.max_tokens:
            return FinishReason.LENGTH
        if len(prompt) + len(answer.ids) >= self.facts.context_limit:
            return FinishReason.CONTEXT
        return None

    def _is_stopped(self, turn: str) -> bool:
        return self._closing or self._stopped_turn == turn

    def _refuse_too_long(self, prompt: Sequence[int]) -> None:
        if len(prompt) >= self.facts.context_limit:
            raise KvchatError(
                f"This conversation is {len(prompt):,} tokens and the context holds "
                f"{self.facts.context_limit:,}, so there is no room for an answer. "
                "Start a new conversation, or send a shorter message."
            )

    def _cache_for(self, request: TurnRequest) -> Kept:
        """The kept cache in mode `on`; in the other modes a new one, and the kept one is freed."""
        if request.mode is CacheMode.ON:
            return self._kept.setdefault(request.conversation, self._empty())
        self._kept.pop(request.conversation, None)
        self._why_empty[request.conversation] = explain.WHEN_DISCARDED[request.mode]
        return self._empty()

    def _empty(self) -> Kept:
        return Kept(ConversationKV(self.facts.layers))

    def _reader(self, mode: CacheMode, kv: ConversationKV) -> Reader:
        if mode is CacheMode.OFF:
            return UncachedReader(self._loaded.model)
        return CachedReader(self._loaded.model, kv)

    def _explain(self, request: TurnRequest, kept: Kept, *, dropped: bool) -> str:
        if not explain.has_history(request.messages):
            return ""
        if request.mode is not CacheMode.ON:
            return explain.NEVER_KEPT[request.mode]
        if not kept.kv:
            return self._why_empty.pop(request.conversation, explain.NOT_READ_YET)
        return explain.explain_difference(kept.messages, request.messages) if dropped else ""
