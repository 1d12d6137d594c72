"""Proves on a model and a conversation that the KV cache changes nothing: in fp32, token by token.

Every way in which a cache can come about is compared with one pass of plain transformers over the same
tokens, which uses no cache. Where a policy leaves a gap, that pass hides the dropped tokens from everything
that was read after they went: that is what such a cache claims to be.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvchat.cache.disk.disk_store import DiskStore
from kvchat.contract import (
    CacheMode,
    Evicted,
    EvictionPolicy,
    Fork,
    PromptMessage,
    Sampling,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
)
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.forward import forward_pass
from kvchat.engine.model.loader import LoadedModel
from kvchat.errors import KvchatError

TOLERANCE = 1e-3
"""fp32 passes over the same tokens in other chunks differ by about 1e-4, one wrong cached token by over 1."""
QUESTIONS = (
    "Name three rivers of Europe, and say in one sentence where each of them ends.",
    "Which of them is the longest?",
    "Write two sentences about the towns on its banks.",
)
DISK_CAP = 1 << 40


@dataclass(frozen=True, slots=True)
class Check:
    """How one way of caching compares with no cache."""

    name: str
    compared: int
    """Generated tokens."""
    differing: int | None
    """The first generated token that differs; None where none does."""
    gap: float
    """The largest difference between two logits."""

    @property
    def equal(self) -> bool:
        """Whether the cache changed nothing."""
        return self.differing is None and self.gap <= TOLERANCE


@dataclass(slots=True)
class Answered:
    """A turn that was answered, and what the model said at each of its tokens."""

    finished: TurnFinished
    ids: tuple[int, ...]
    """Every token read, and the last one generated."""
    logits: torch.Tensor
    """`[generated, vocabulary]`."""
    kept: list[tuple[int, frozenset[int]]]
    """For each eviction: tokens read before it, and which of them stayed."""


@dataclass(slots=True)
class Chat:
    """One conversation with an engine."""

    loaded: LoadedModel
    engine: LocalEngine
    name: str
    tokens: int
    policy: EvictionPolicy = EvictionPolicy.NONE
    evicted_messages: int = 0
    messages: list[PromptMessage] = field(default_factory=list)

    def ask(self, question: str) -> Answered:
        """One more turn, greedy."""
        self.messages.append(PromptMessage("user", question))
        request = TurnRequest(
            f"verify {len(self.messages)}",
            self.name,
            tuple(self.messages),
            CacheMode.ON,
            Sampling(max_tokens=self.tokens),
            policy=self.policy,
            evicted_messages=self.evicted_messages,
        )
        passes: list[torch.Tensor] = []
        kept: list[tuple[int, frozenset[int]]] = []
        with _recording(self.loaded, passes):
            for event in self.engine.turn(request):
                self._note_eviction(event, kept)
        if not isinstance(event, TurnFinished):
            raise KvchatError(event.reason if isinstance(event, TurnFailed) else "The engine gave no answer.")
        self.messages.append(PromptMessage("assistant", event.text, event.token_ids, event.tokenizer))
        self.evicted_messages = event.evicted_messages
        generated = event.stats.generated_tokens
        ids = self._kv_ids()
        return Answered(event, ids, torch.stack(passes[-generated:]), kept)

    def _note_eviction(self, event: TurnEvent, kept: list[tuple[int, frozenset[int]]]) -> None:
        cache = self.engine.caches.get(self.name)
        if isinstance(event, Evicted) and cache and cache.kv.has_gap:
            kept.append((len(cache.kv.ids), frozenset(cache.kv.rows)))

    def _kv_ids(self) -> tuple[int, ...]:
        cache = self.engine.caches.get(self.name)
        assert cache is not None
        return cache.kv.ids


def run_checks(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Iterator[Check]:
    """Every check that this model can take, one by one; the model has to be in fp32."""
    if loaded.facts.weights_dtype != "fp32":
        raise ValueError("equality holds in fp32 only")
    yield _check("kept across turns", loaded, lambda: _linear(loaded, questions, tokens, 512))
    yield _check("prefilled in chunks of 7", loaded, lambda: _linear(loaded, questions, tokens, 7))
    yield _check("restored from disk", loaded, lambda: _restored(loaded, questions, tokens))
    yield _check("forked", loaded, lambda: _forked(loaded, questions, tokens))
    yield _check("cropped by an edit", loaded, lambda: _edited(loaded, questions, tokens))
    for policy in (EvictionPolicy.TURNS, EvictionPolicy.SINKS, EvictionPolicy.SNAPKV):
        if policy is EvictionPolicy.TURNS or not loaded.facts.gap_refusal:
            evicted = partial(_evicted, loaded, questions, tokens, policy)
            yield _check(f"after {policy}", loaded, evicted)


def _check(name: str, loaded: LoadedModel, answer: Callable[[], Answered]) -> Check:
    answered = answer()
    cold = uncached_logits(loaded, answered)
    gap = float((cold - answered.logits).abs().max())
    same = cold.argmax(dim=-1) == answered.logits.argmax(dim=-1)
    differing = None if bool(same.all()) else int((~same).nonzero()[0])
    return Check(name, len(cold), differing, gap)


@torch.inference_mode()
def uncached_logits(loaded: LoadedModel, answered: Answered) -> torch.Tensor:
    """Logits `[generated, vocabulary]` of one pass over all tokens that uses no cache."""
    ids, generated = answered.ids, len(answered.logits)
    # the last generated token was never read, and the first one was chosen after the prompt's last
    if not answered.kept:
        return forward_pass(loaded.model, ids, range(len(ids)), None, keep=generated).float()
    output = loaded.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(len(ids))[None],
        attention_mask=hiding_mask(len(ids), answered.kept),
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0, -generated:].float()
    return logits


def hiding_mask(tokens: int, kept: Sequence[tuple[int, frozenset[int]]]) -> torch.Tensor:
    """`[1, 1, tokens, tokens]`: 0 where a query may look, the lowest number where it may not."""
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for read, stayed in kept:
        gone = torch.tensor([i not in stayed for i in range(read)])
        visible[read:, :read] &= ~gone
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(tokens, tokens).masked_fill(~visible, lowest)[None, None]


@contextmanager
def _recording(loaded: LoadedModel, passes: list[torch.Tensor]) -> Iterator[None]:
    """Notes what every forward pass says after its last token."""

    def note(_module: object, _args: object, output: CausalLMOutputWithPast) -> None:
        assert output.logits is not None
        passes.append(output.logits[0, -1].float().clone())

    hook = loaded.model.register_forward_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _linear(loaded: LoadedModel, questions: Sequence[str], tokens: int, chunk: int) -> Answered:
    chat = Chat(loaded, LocalEngine(loaded, prefill_chunk=chunk), "linear", tokens)
    return [chat.ask(question) for question in questions][-1]


def _restored(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    with tempfile.TemporaryDirectory(prefix="kvchat-verify-") as folder:
        first = LocalEngine(loaded, disk=DiskTier(DiskStore(Path(folder), DISK_CAP)))
        chat = Chat(loaded, first, "restored", tokens)
        for question in questions[:-1] or questions:
            chat.ask(question)
        first.close()
        chat.engine = LocalEngine(loaded, disk=DiskTier(DiskStore(Path(folder), DISK_CAP)))
        answered = chat.ask(questions[-1])
        chat.engine.close()
    if not answered.finished.stats.restored_tokens:
        raise KvchatError(f"Nothing was restored: {answered.finished.stats.reuse_note}")
    return answered


def _forked(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    engine = LocalEngine(loaded)
    parent = Chat(loaded, engine, "parent", tokens)
    for question in questions[:-1] or questions:
        parent.ask(question)
    engine.command(Fork("parent", "child"))
    child = Chat(loaded, engine, "child", tokens, messages=list(parent.messages))
    parent.ask("And what else?")
    return child.ask(questions[-1])


def _edited(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    chat = Chat(loaded, LocalEngine(loaded), "edited", tokens)
    for question in questions:
        chat.ask(question)
    del chat.messages[2:]
    return chat.ask("Say that again in other words.")


def _evicted(loaded: LoadedModel, questions: Sequence[str], tokens: int, policy: EvictionPolicy) -> Answered:
    """The chat in a context so small that its last turn fills it."""
    measured = _linear(loaded, questions, tokens, 512)
    limit = len(measured.ids) - tokens // 2
    small = replace(loaded, facts=replace(loaded.facts, context_limit=limit))
    chat = Chat(small, LocalEngine(small), "evicted", tokens, policy)
    answers = [chat.ask(question) for question in questions]
    if not any(a.finished.stats.evicted_tokens for a in answers):
        raise KvchatError(f"The policy {policy} dropped nothing: the conversation is too short to check it.")
    kept = [each for a in answers for each in a.kept]
    return replace(answers[-1], kept=kept)
