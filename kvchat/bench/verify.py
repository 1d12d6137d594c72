"""Checks on a model and a conversation that the KV cache does not change the logits.

Each way to produce a cache is compared with one forward pass over the same tokens without a cache. In fp32
that is a pass of plain transformers; where a policy leaves a gap, its mask hides the evicted tokens from all
later tokens. Compiled weights are compared with a pass of the same compiled code over an empty cache.

The compared values are the logits from which the engine chose its tokens, in prefill, decode and verification
of drafts.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvchat.bench.chat import Chat
from kvchat.cache.disk.disk_store import DiskStore
from kvchat.contract import Evicted, EvictionPolicy, Fork, Sampling, TurnEvent, TurnFinished
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.forward import forward_pass
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.sampler import Sampler
from kvchat.errors import KvchatError
from kvchat.validation.bounds import INT64

TOLERANCE = 1e-3
"""Chunking changes fp32 logits by about 1e-4, one wrong cached token by more than 1."""
QUESTIONS = (
    "Name three rivers of Europe, and say in one sentence where each of them ends.",
    "Which of them is the longest?",
    "Write two sentences about the towns on its banks.",
)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one comparison."""

    name: str
    compared: int
    """Number of generated tokens."""
    differing: int | None
    """Index of the first generated token that is not the most probable one without a cache; None without one.

    Tokens whose logits differ by less than `TOLERANCE` count as equally probable.
    """
    gap: float
    """The largest difference between two logits."""

    @property
    def equal(self) -> bool:
        """Whether the cache changed nothing."""
        return self.differing is None and self.gap <= TOLERANCE


@dataclass(slots=True)
class Answered:
    """A finished turn and its logits."""

    finished: TurnFinished
    ids: tuple[int, ...]
    """The token sequence in the cache: all but the last generated token."""
    chosen: torch.Tensor
    """`[compared]`: the last generated tokens."""
    logits: torch.Tensor
    """`[compared, vocabulary]`: the logits from which they were chosen."""
    evictions: list[tuple[int, frozenset[int]]]
    """For each eviction that left a gap: the number of tokens before it, and the indices that remained."""


class RecordingSampler(Sampler):
    """A sampler that records the logits and the chosen ids."""

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

    def clear(self) -> None:
        """Deletes the recording."""
        self.rows.clear()
        self.chosen.clear()


class RecordingEngine(LocalEngine):
    """An engine that records the logits of its latest turn."""

    def __init__(self, loaded: LoadedModel, **options: Any) -> None:  # noqa: ANN401 - the engine's own
        super().__init__(loaded, new_sampler=self._new_sampler, **options)
        self.sampler = RecordingSampler(Sampling())
        """Of the latest turn."""

    def _new_sampler(self, sampling: Sampling) -> Sampler:
        self.sampler = RecordingSampler(sampling)
        return self.sampler


class KnownAnswerDrafter:
    """Drafts from a known answer: two right tokens, then a wrong one, to test acceptance and rejection."""

    RIGHT = 2

    def __init__(self, text: Sequence[int], vocabulary: int) -> None:
        """`text` is the whole conversation as token ids."""
        self._text = tuple(text)
        self._vocabulary = vocabulary

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """The text after its prefix `tokens`, with a wrong last token; empty if they are not its prefix."""
        place = len(tokens)
        if self._text[:place] != tuple(tokens):
            return []
        guess = list(self._text[place : place + min(most, self.RIGHT + 1)])
        return [*guess[:-1], (guess[-1] + 1) % self._vocabulary] if guess else []

    def record(self, proposed: int, accepted: int) -> None:
        """Ignores the result."""


def ask(chat: Chat, question: str) -> Answered:
    """One more turn of a chat with a `RecordingEngine`."""
    engine = chat.engine
    assert isinstance(engine, RecordingEngine)
    evictions: list[tuple[int, frozenset[int]]] = []

    def on_event(event: TurnEvent) -> None:
        if not isinstance(event, Evicted):
            return
        cache = engine.caches.get(chat.name)
        if cache and cache.kv.index.has_gap:
            evictions.append((len(cache.kv.ids), frozenset(cache.kv.rows)))
        else:  # the prompt was prefilled again without the oldest messages: earlier logits don't compare
            engine.sampler.clear()

    finished = chat.ask(question, on_event)
    cache, recorded = engine.caches.get(chat.name), engine.sampler
    assert cache is not None
    return Answered(
        finished, cache.kv.ids, torch.tensor(recorded.chosen), torch.stack(recorded.rows), evictions
    )


Uncached = Callable[[LoadedModel, Answered], torch.Tensor]
"""Computes the logits `[compared, vocabulary]` of one pass without a cache."""


def run_checks(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Iterator[Check]:
    """Yields every check that applies to this model, against transformers without a cache.

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
    """Whether the model has compiled code whose results are bit-identical for every batch size."""
    words = loaded.step.description.weights.replace(",", "").split() if loaded.step else ()
    return bool(words) and not {"fp32", "bf16"} & set(words)


def run_compiled_checks(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Iterator[Check]:
    """Yields the checks without a mask, against the same compiled code over an empty cache.

    Raises:
        ValueError: `can_check_compiled` is false.
        KvchatError: a turn failed, or the conversation is too short for a check.
    """
    if not can_check_compiled(loaded):
        raise ValueError("equality holds for compiled code with packed weights only")
    linear = _linear(loaded, questions, tokens)
    yield from _exact_checks(loaded, questions, tokens, linear, fresh_logits)


def _exact_checks(
    loaded: LoadedModel, questions: Sequence[str], tokens: int, linear: Answered, uncached: Uncached
) -> Iterator[Check]:
    """The checks of caches without gaps."""
    ways: dict[str, Callable[[], Answered]] = {
        "kept across turns": lambda: linear,
        "prefilled in chunks of 7": lambda: _linear(loaded, questions, tokens, prefill_chunk=7),
        "drafted, and taken back": lambda: _drafted(loaded, questions, tokens, linear.ids),
        "restored from disk": lambda: _restored(loaded, questions, tokens),
        "forked": lambda: _forked(loaded, questions, tokens),
        "cropped by an edit": lambda: _edited(loaded, questions, tokens),
        "after turns": lambda: _evicted(loaded, questions, tokens, EvictionPolicy.TURNS, len(linear.ids)),
    }
    if loaded.new_kv().states:  # recurrent states can't be truncated by single tokens
        del ways["drafted, and taken back"]
    for name, way in ways.items():
        answered = way()
        yield _compared(name, answered, uncached(loaded, answered))


def _compared(name: str, answered: Answered, expected: torch.Tensor) -> Check:
    gap = float((expected - answered.logits).abs().max())
    behind = expected.amax(dim=-1) - expected.gather(-1, answered.chosen[:, None])[:, 0]
    wrong = (behind > TOLERANCE).nonzero()
    return Check(name, len(expected), int(wrong[0]) if len(wrong) else None, gap)


@torch.inference_mode()
def uncached_logits(loaded: LoadedModel, answered: Answered) -> torch.Tensor:
    """Logits `[compared, vocabulary]` of one pass of transformers over all tokens without a cache."""
    ids, compared = answered.ids, len(answered.logits)
    # row i of the last `compared` rows predicts generated token i
    if not answered.evictions:
        return forward_pass(loaded.model, ids, range(len(ids)), None, keep=compared).float()
    output = loaded.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(len(ids))[None],
        attention_mask=hiding_mask(len(ids), answered.evictions),
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0, -compared:].float()
    return logits


@torch.inference_mode()
def fresh_logits(loaded: LoadedModel, answered: Answered) -> torch.Tensor:
    """Logits `[compared, vocabulary]` of the model's own code over an empty cache."""
    reader = loaded.reader(loaded.new_kv())
    return reader.read(answered.ids, keep=len(answered.logits)).float()


def hiding_mask(tokens: int, evictions: Sequence[tuple[int, frozenset[int]]]) -> torch.Tensor:
    """A causal mask `[1, 1, tokens, tokens]` that also hides evicted keys from later queries.

    0 where a query sees a key, the lowest fp32 number elsewhere. `evictions` as in `Answered`.
    """
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for count, remaining in evictions:
        evicted = torch.tensor([i not in remaining for i in range(count)])
        visible[count:, :count] &= ~evicted
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(tokens, tokens).masked_fill(~visible, lowest)[None, None]


def _linear(loaded: LoadedModel, questions: Sequence[str], tokens: int, **options: Any) -> Answered:  # noqa: ANN401
    """The last answer of the whole chat; `options` are the engine's."""
    chat = Chat(RecordingEngine(loaded, **options), "linear", tokens, policy=EvictionPolicy.NONE)
    return [ask(chat, question) for question in questions][-1]


def _drafted(loaded: LoadedModel, questions: Sequence[str], tokens: int, text: Sequence[int]) -> Answered:
    """The chat with drafts from its known token sequence `text`."""
    drafter = KnownAnswerDrafter(text, loaded.vocabulary)
    engine = RecordingEngine(loaded, new_drafter=lambda: drafter)
    chat = Chat(engine, "drafted", tokens, policy=EvictionPolicy.NONE)
    answers = [ask(chat, question) for question in questions]
    drafted = sum(a.finished.stats.drafted_tokens for a in answers)
    if not drafted > sum(a.finished.stats.accepted_tokens for a in answers) > 0:
        raise KvchatError("No draft was right and then wrong: the answers are too short to check drafts.")
    return answers[-1]


def _restored(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    with tempfile.TemporaryDirectory(prefix="kvchat-verify-") as folder:
        first = RecordingEngine(loaded, disk=DiskTier(DiskStore(Path(folder), INT64)))
        chat = Chat(first, "restored", tokens, policy=EvictionPolicy.NONE)
        for question in questions[:-1] or questions:
            chat.ask(question)
        first.close()
        chat.engine = RecordingEngine(loaded, disk=DiskTier(DiskStore(Path(folder), INT64)))
        answered = ask(chat, questions[-1])
        chat.engine.close()
    if not answered.finished.stats.restored_tokens:
        raise KvchatError(f"Nothing was restored: {answered.finished.stats.reuse_note}")
    return answered


def _forked(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    engine = RecordingEngine(loaded)
    parent = Chat(engine, "parent", tokens, policy=EvictionPolicy.NONE)
    for question in questions[:-1] or questions:
        parent.ask(question)
    engine.command(Fork("parent", "child"))
    child = Chat(engine, "child", tokens, list(parent.messages), EvictionPolicy.NONE)
    parent.ask("And what else?")
    return ask(child, questions[-1])


def _edited(loaded: LoadedModel, questions: Sequence[str], tokens: int) -> Answered:
    chat = Chat(RecordingEngine(loaded), "edited", tokens, policy=EvictionPolicy.NONE)
    for question in questions:
        chat.ask(question)
    del chat.messages[2:]
    return ask(chat, "Say that again in other words.")


def _evicted(
    loaded: LoadedModel, questions: Sequence[str], tokens: int, policy: EvictionPolicy, length: int
) -> Answered:
    """The chat of `length` tokens with a context limit that its last turn exceeds."""
    limit = length - tokens // 2
    small = replace(loaded, facts=replace(loaded.facts, context_limit=limit))
    chat = Chat(RecordingEngine(small), "evicted", tokens, policy=policy)
    answers = [ask(chat, question) for question in questions]
    if not any(a.finished.stats.evicted_tokens for a in answers):
        raise KvchatError(f"The policy {policy} evicted nothing: the conversation is too short to check it.")
    return replace(answers[-1], evictions=[each for a in answers for each in a.evictions])
