"""Proves on a model and a conversation that the KV cache changes nothing, token by token.

Every way in which a cache can come about is compared with one pass over the same tokens that uses no cache.
In fp32 that is a pass of plain transformers; where a policy leaves a gap, that pass hides the dropped tokens
from everything that was read after they went: that is what such a cache claims to be. Compiled weights are
compared with a pass through the same compiled code over an empty cache.

What is compared are the rows of logits from which the engine chose its tokens, whichever pass they came from:
prefill, a single token, or several drafted ones.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

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
from kvchat.engine.sampler import Sampler
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
    """The first generated token that is not the most probable one without a cache; None where each is.

    Two tokens whose logits are closer than `TOLERANCE` are equally probable.
    """
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
    """Every token read: all but the last one generated."""
    chosen: torch.Tensor
    """`[compared]`: the last tokens generated."""
    logits: torch.Tensor
    """`[compared, vocabulary]`: what each of them was chosen from."""
    kept: list[tuple[int, frozenset[int]]]
    """For each eviction: tokens read before it, and which of them stayed."""


class RecordingSampler(Sampler):
    """Chooses as any other, and keeps what it chose and from what."""

    def __init__(self, sampling: Sampling) -> None:
        super().__init__(sampling)
        self.rows: list[torch.Tensor] = []
        """`[vocabulary]` each."""
        self.chosen: list[int] = []

    def choose(self, logits: torch.Tensor, context: Sequence[int]) -> int:
        """The next id from logits `[1, vocabulary]`."""
        self.rows.append(logits[0].float().clone())
        self.chosen.append(super().choose(logits, context))
        return self.chosen[-1]

    def forget(self) -> None:
        """Drops what was recorded so far."""
        self.rows.clear()
        self.chosen.clear()


class RecordingEngine(LocalEngine):
    """An engine that keeps the logits behind the answer of its latest turn."""

    def __init__(self, loaded: LoadedModel, **options: Any) -> None:  # noqa: ANN401 - the engine's own
        super().__init__(loaded, new_sampler=self._new_sampler, **options)
        self.sampler = RecordingSampler(Sampling())
        """Of the latest turn."""

    def _new_sampler(self, sampling: Sampling) -> Sampler:
        self.sampler = RecordingSampler(sampling)
        return self.sampler


class Foreseeing:
    """Guesses from an answer that is known: two right tokens and a wrong one, so that both always happen."""

    RIGHT = 2

    def __init__(self, text: Sequence[int], vocabulary: int) -> None:
        """`text` is the whole conversation as token ids."""
        self._text = tuple(text)
        self._vocabulary = vocabulary

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What follows `tokens` in the text, the last one made wrong; nothing where they don't begin it."""
        place = len(tokens)
        if self._text[:place] != tuple(tokens):
            return []
        guess = list(self._text[place : place + min(most, self.RIGHT + 1)])
        return [*guess[:-1], (guess[-1] + 1) % self._vocabulary] if guess else []

    def record(self, proposed: int, accepted: int) -> None:
        """Changes nothing."""


@dataclass(slots=True)
class Chat:
    """One conversation with an engine."""

    loaded: LoadedModel
    engine: RecordingEngine
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
        kept: list[tuple[int, frozenset[int]]] = []
        for event in self.engine.turn(request):
            self._note_eviction(event, kept)
        if not isinstance(event, TurnFinished):
            raise KvchatError(event.reason if isinstance(event, TurnFailed) else "The engine gave no answer.")
        self.messages.append(PromptMessage("assistant", event.text, event.token_ids, event.tokenizer))
        self.evicted_messages = event.evicted_messages
        recorded = self.engine.sampler
        return Answered(
            event, self._kv_ids(), torch.tensor(recorded.chosen), torch.stack(recorded.rows), kept
        )

    def _note_eviction(self, event: TurnEvent, kept: list[tuple[int, frozenset[int]]]) -> None:
        cache = self.engine.caches.get(self.name)
        if not isinstance(event, Evicted):
            return
        if cache and cache.kv.index.has_gap:
            kept.append((len(cache.kv.ids), frozenset(cache.kv.rows)))
        else:  # what was said before was said of messages that nobody reads any more
            self.engine.sampler.forget()

    def _kv_ids(self) -> tuple[int, ...]:
        cache = self.engine.caches.get(self.name)
        assert cache is not None
        return cache.kv.ids


Cold = Callable[[LoadedModel, Answered], torch.Tensor]
"""The logits `[compared, vocabulary]` of a pass that uses no cache."""


def run_checks(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Iterator[Check]:
    """Every check that this model can take, one by one, against transformers without a cache.

    Raises:
        ValueError: the model is not in fp32.
        KvchatError: a turn failed, or the conversation is too short for a check.
    """
    if loaded.facts.weights_dtype != "fp32":
        raise ValueError("equality holds in fp32 only")
    linear = _linear(loaded, questions, tokens)
    yield from _exact_checks(loaded, questions, tokens, linear, uncached_logits)
    if not loaded.facts.gap_refusal:
        for policy in (EvictionPolicy.SINKS, EvictionPolicy.SNAPKV):
            answered = _evicted(loaded, questions, tokens, policy, len(linear.ids))
            yield _compared(f"after {policy}", answered, uncached_logits(loaded, answered))


def can_check_compiled(loaded: LoadedModel) -> bool:
    """Whether it is compiled to code in which a token counts the same in passes of any length."""
    words = loaded.step.description.weights.replace(",", "").split() if loaded.step else ()
    return bool(words) and not {"fp32", "bf16"} & set(words)


def run_compiled_checks(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Iterator[Check]:
    """The checks that need no mask, one by one, against the same compiled code over an empty cache.

    Raises:
        ValueError: there is no such code; see `can_check_compiled`.
        KvchatError: a turn failed, or the conversation is too short for a check.
    """
    if not can_check_compiled(loaded):
        raise ValueError("equality holds for compiled code with packed weights only")
    linear = _linear(loaded, questions, tokens)
    yield from _exact_checks(loaded, questions, tokens, linear, fresh_logits)


def _exact_checks(
    loaded: LoadedModel, questions: Sequence[str], tokens: int, linear: Answered, cold: Cold
) -> Iterator[Check]:
    """Every way of caching that changes nothing at all."""
    ways: dict[str, Callable[[], Answered]] = {
        "kept across turns": lambda: linear,
        "prefilled in chunks of 7": lambda: _linear(loaded, questions, tokens, prefill_chunk=7),
        "drafted, and taken back": lambda: _drafted(loaded, questions, tokens, linear.ids),
        "restored from disk": lambda: _restored(loaded, questions, tokens),
        "forked": lambda: _forked(loaded, questions, tokens),
        "cropped by an edit": lambda: _edited(loaded, questions, tokens),
        "after turns": lambda: _evicted(loaded, questions, tokens, EvictionPolicy.TURNS, len(linear.ids)),
    }
    if loaded.new_kv().states:  # a recurrent state can't take a token back
        del ways["drafted, and taken back"]
    for name, way in ways.items():
        answered = way()
        yield _compared(name, answered, cold(loaded, answered))


def _compared(name: str, answered: Answered, cold: torch.Tensor) -> Check:
    gap = float((cold - answered.logits).abs().max())
    behind = cold.amax(dim=-1) - cold.gather(-1, answered.chosen[:, None])[:, 0]
    wrong = (behind > TOLERANCE).nonzero()
    return Check(name, len(cold), int(wrong[0]) if len(wrong) else None, gap)


@torch.inference_mode()
def uncached_logits(loaded: LoadedModel, answered: Answered) -> torch.Tensor:
    """Logits `[compared, vocabulary]` of one pass of transformers over all tokens that uses no cache."""
    ids, compared = answered.ids, len(answered.logits)
    # the last generated token was never read, and the first one was chosen after the prompt's last
    if not answered.kept:
        return forward_pass(loaded.model, ids, range(len(ids)), None, keep=compared).float()
    output = loaded.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(len(ids))[None],
        attention_mask=hiding_mask(len(ids), answered.kept),
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0, -compared:].float()
    return logits


@torch.inference_mode()
def fresh_logits(loaded: LoadedModel, answered: Answered) -> torch.Tensor:
    """Logits `[compared, vocabulary]` of the code that answered, reading all tokens into an empty cache."""
    reader = loaded.reader(loaded.new_kv())
    return reader.read(answered.ids, keep=len(answered.logits)).float()


def hiding_mask(tokens: int, kept: Sequence[tuple[int, frozenset[int]]]) -> torch.Tensor:
    """`[1, 1, tokens, tokens]`: 0 where a query may look, the lowest number where it may not."""
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for read, stayed in kept:
        gone = torch.tensor([i not in stayed for i in range(read)])
        visible[read:, :read] &= ~gone
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(tokens, tokens).masked_fill(~visible, lowest)[None, None]


def _linear(loaded: LoadedModel, questions: Sequence[str], tokens: int, **options: Any) -> Answered:  # noqa: ANN401
    """The last answer; `options` are the engine's."""
    chat = Chat(loaded, RecordingEngine(loaded, **options), "linear", tokens)
    return [chat.ask(question) for question in questions][-1]


def _drafted(loaded: LoadedModel, questions: Sequence[str], tokens: int, text: Sequence[int]) -> Answered:
    """The chat, of which `text` are the ids, with a drafter that is right twice and then wrong."""
    foreseeing = Foreseeing(text, loaded.vocabulary)
    chat = Chat(loaded, RecordingEngine(loaded, new_drafter=lambda: foreseeing), "drafted", tokens)
    answers = [chat.ask(question) for question in questions]
    drafted = sum(a.finished.stats.drafted_tokens for a in answers)
    if not drafted > sum(a.finished.stats.accepted_tokens for a in answers) > 0:
        raise KvchatError("No draft was right and then wrong: the answers are too short to check drafts.")
    return answers[-1]


def _restored(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    with tempfile.TemporaryDirectory(prefix="kvchat-verify-") as folder:
        first = RecordingEngine(loaded, disk=DiskTier(DiskStore(Path(folder), DISK_CAP)))
        chat = Chat(loaded, first, "restored", tokens)
        for question in questions[:-1] or questions:
            chat.ask(question)
        first.close()
        chat.engine = RecordingEngine(loaded, disk=DiskTier(DiskStore(Path(folder), DISK_CAP)))
        answered = chat.ask(questions[-1])
        chat.engine.close()
    if not answered.finished.stats.restored_tokens:
        raise KvchatError(f"Nothing was restored: {answered.finished.stats.reuse_note}")
    return answered


def _forked(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    engine = RecordingEngine(loaded)
    parent = Chat(loaded, engine, "parent", tokens)
    for question in questions[:-1] or questions:
        parent.ask(question)
    engine.command(Fork("parent", "child"))
    child = Chat(loaded, engine, "child", tokens, messages=list(parent.messages))
    parent.ask("And what else?")
    return child.ask(questions[-1])


def _edited(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    chat = Chat(loaded, RecordingEngine(loaded), "edited", tokens)
    for question in questions:
        chat.ask(question)
    del chat.messages[2:]
    return chat.ask("Say that again in other words.")


def _evicted(
    loaded: LoadedModel, questions: Sequence[str], tokens: int, policy: EvictionPolicy, length: int
) -> Answered:
    """The chat, `length` tokens long, in a context so small that its last turn fills it."""
    limit = length - tokens // 2
    small = replace(loaded, facts=replace(loaded.facts, context_limit=limit))
    chat = Chat(small, RecordingEngine(small), "evicted", tokens, policy)
    answers = [chat.ask(question) for question in questions]
    if not any(a.finished.stats.evicted_tokens for a in answers):
        raise KvchatError(f"The policy {policy} dropped nothing: the conversation is too short to check it.")
    kept = [each for a in answers for each in a.kept]
    return replace(answers[-1], kept=kept)
