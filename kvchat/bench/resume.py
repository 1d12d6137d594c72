"""Measures what a kept cache is worth to a long conversation: its next turn cold, warm, switched to, and
restored.

The history is made of sentences, so that the whole way of a turn is in the figures: template, tokenizer,
plan, read.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvchat.bench.rows import Row, Runner
from kvchat.cache.disk.disk_store import DiskStore
from kvchat.contract import CacheMode, Drop, PromptMessage, Sampling, TurnFailed, TurnFinished, TurnRequest
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from kvchat.errors import KvchatError

RUNS = 5
COLD_RUNS = 3
"""They read everything and take the longest."""
PAIRS = 11
"""Of a warm turn and one after a switch: the difference is small, so it needs more of them."""
ANSWER_TOKENS = 2
ROOM = 160
"""Tokens after the context for the turns that are measured: five of them."""
HISTORY_CASES = 3
"""How many times a case is announced at each context."""
QUESTION = "How long does the drive over the first pass take?"
SENTENCE = "The drive over pass {} takes {} hours, and the train takes two hours more."
NO_CAP = 1 << 62
MAIN, OTHER = "main", "other"


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


def history_rows(loaded: LoadedModel, context: int, runner: Runner) -> Iterator[Row]:
    """The next turn of a conversation of that length, in every way that it can begin."""
    with tempfile.TemporaryDirectory(prefix="kvchat-bench-") as folder:
        yield from _at(loaded, context, Path(folder), runner)


def _at(loaded: LoadedModel, context: int, folder: Path, runner: Runner) -> Iterator[Row]:
    history = history_of(loaded, context)
    engine = _engine(loaded, folder)
    runner.note(f"a turn after {context:,} tokens, cold")
    yield _row(context, "cold", runner.repeated(lambda: _cold(engine, history), COLD_RUNS))
    talk, other = Talk(engine, MAIN, list(history)), Talk(engine, OTHER)
    before, after = talk.ask().stats, talk.ask().stats
    pairs, restores = rounds(
        loaded.facts.context_limit - after.kv_tokens, after.prompt_tokens - before.prompt_tokens
    )
    runner.note(f"a turn after {context:,} tokens, warm and switched to")
    # in turns, so that both meet the same machine and the same growing history
    both = runner.repeated(lambda: (talk.ask(), _after(other, talk)), pairs)
    yield _row(context, "warm", [warm for warm, _ in both])
    yield _row(context, "switched", [switched for _, switched in both])
    engine.close()
    runner.note(f"a turn after {context:,} tokens, restored from disk")
    again = runner.repeated(lambda: _restored(loaded, folder, talk.messages), restores)
    yield _row(context, "restored", again)


def rounds(room: int, grown: int) -> tuple[int, int]:
    """(pairs of a warm turn and one after a switch, restores): each turn grows the conversation, and where
    the context fills up, what is measured is something else."""
    turns = room // max(grown, 1)
    restores = min(RUNS, max(1, turns // 3))
    return min(PAIRS, max(1, (turns - restores) // 2)), restores


def history_of(loaded: LoadedModel, context: int) -> list[PromptMessage]:
    """Two messages that the model reads as about `context` tokens."""
    count = context // len(loaded.tokenizer.encode(SENTENCE.format(100, 3)).ids)
    text = " ".join(SENTENCE.format(i, i % 9 + 1) for i in range(count))
    return [PromptMessage("user", text), PromptMessage("assistant", "I have read it.")]


def _engine(loaded: LoadedModel, folder: Path) -> LocalEngine:
    return LocalEngine(loaded, disk=DiskTier(DiskStore(folder, NO_CAP)))


def _cold(engine: LocalEngine, history: Sequence[PromptMessage]) -> TurnFinished:
    engine.command(Drop(MAIN))
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


def _row(context: int, how: str, turns: Sequence[TurnFinished]) -> Row:
    """`how` is `cold`, `warm`, `switched` (another conversation was answered in between) or `restored`."""
    stats = [turn.stats for turn in turns]
    ttft, read = statistics.median(each.ttft_s for each in stats), stats[-1].prefilled_tokens
    return Row(
        "restore",
        context,
        how,
        read / ttft,
        runs=len(turns),
        ttft_s=ttft,
        read_tokens=read,
        kv_bytes=stats[-1].kv_bytes,
        restore_s=statistics.median(each.restore_s for each in stats) or None,
    )
