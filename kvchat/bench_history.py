"""Measures what a kept cache is worth to a long conversation: its next turn cold, warm, switched to, and
restored.

The history is made of sentences, so that the whole way of a turn is in the figures: template, tokenizer,
plan, read.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvchat.cache.shelf import Shelf
from kvchat.contract import CacheMode, Drop, PromptMessage, Sampling, TurnFailed, TurnFinished, TurnRequest
from kvchat.engine.disk import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.load import LoadedModel
from kvchat.errors import KvchatError

RUNS = 5
COLD_RUNS = 3
"""They read everything and take the longest."""
PAIRS = 11
"""Of a warm turn and one after a switch: the difference is small, so it needs more of them."""
ANSWER_TOKENS = 2
QUESTION = "How long does the drive over the first pass take?"
SENTENCE = "The drive over pass {} takes {} hours, and the train takes two hours more."
NO_CAP = 1 << 62
MAIN, OTHER = "main", "other"


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """How long the first token of a turn took after so much history; medians."""

    context: int
    how: str
    """`cold`, `warm`, `switched` (another conversation was answered in between) or `restored`."""
    ttft_s: float
    read_tokens: int
    restore_s: float = 0.0
    kv_bytes: int = 0


@dataclass(slots=True)
class Talk:
    """A conversation that grows by a question and an answer with every turn."""

    engine: LocalEngine
    name: str
    messages: list[PromptMessage] = field(default_factory=list)

    def ask(self) -> TurnFinished:
        """Answers one more question."""
        self.messages.append(PromptMessage("user", QUESTION))
        request = TurnRequest(
            "bench", self.name, tuple(self.messages), CacheMode.ON, Sampling(max_tokens=ANSWER_TOKENS)
        )
        *_, last = self.engine.turn(request)
        if isinstance(last, TurnFailed):
            raise KvchatError(last.reason)
        assert isinstance(last, TurnFinished)
        self.messages.append(PromptMessage("assistant", last.text, last.token_ids, last.tokenizer))
        return last


def history_rows(
    loaded: LoadedModel, contexts: Sequence[int], note: Callable[[str], None]
) -> Iterator[HistoryRow]:
    """The next turn of a conversation of each length, in every way that it can begin."""
    for context in contexts:
        with tempfile.TemporaryDirectory(prefix="kvchat-bench-") as folder:
            yield from _at(loaded, context, Path(folder), note)


def _at(loaded: LoadedModel, context: int, folder: Path, note: Callable[[str], None]) -> Iterator[HistoryRow]:
    history = history_of(loaded, context)
    engine = _engine(loaded, folder)
    note(f"a turn after {context:,} tokens, cold")
    cold = [_cold(engine, history) for _ in range(COLD_RUNS)]
    yield _row(context, "cold", cold)
    talk, other = Talk(engine, MAIN, list(history)), Talk(engine, OTHER)
    talk.ask()
    note(f"a turn after {context:,} tokens, warm and switched to")
    # in turns, so that both meet the same machine and the same growing history
    pairs = [(talk.ask(), _after(other, talk)) for _ in range(PAIRS)]
    yield _row(context, "warm", [warm for warm, _ in pairs])
    yield _row(context, "switched", [switched for _, switched in pairs])
    engine.close()
    note(f"a turn after {context:,} tokens, restored from disk")
    yield _row(context, "restored", [_restored(loaded, folder, talk.messages) for _ in range(RUNS)])


def history_of(loaded: LoadedModel, context: int) -> list[PromptMessage]:
    """Two messages that the model reads as about `context` tokens."""
    count = context // len(loaded.tokenizer.encode(SENTENCE.format(100, 3)).ids)
    text = " ".join(SENTENCE.format(i, i % 9 + 1) for i in range(count))
    return [PromptMessage("user", text), PromptMessage("assistant", "I have read it.")]


def _engine(loaded: LoadedModel, folder: Path) -> LocalEngine:
    return LocalEngine(loaded, disk=DiskTier(Shelf(folder, NO_CAP)))


def _cold(engine: LocalEngine, history: Sequence[PromptMessage]) -> TurnFinished:
    engine.act(Drop(MAIN))
    return Talk(engine, MAIN, list(history)).ask()


def _after(other: Talk, talk: Talk) -> TurnFinished:
    other.ask()
    return talk.ask()


def _restored(loaded: LoadedModel, folder: Path, messages: list[PromptMessage]) -> TurnFinished:
    """A new engine's first turn; the files have to come from the disk, not from memory."""
    for path in folder.rglob("*.safetensors"):
        _drop_from_page_cache(path)
    engine = _engine(loaded, folder)
    finished = Talk(engine, MAIN, messages).ask()
    engine.close()
    return finished


def _drop_from_page_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _row(context: int, how: str, turns: Sequence[TurnFinished]) -> HistoryRow:
    stats = [turn.stats for turn in turns]
    return HistoryRow(
        context,
        how,
        statistics.median(s.ttft_s for s in stats),
        stats[-1].prefilled_tokens,
        statistics.median(s.restore_s for s in stats),
        stats[-1].kv_bytes,
    )
