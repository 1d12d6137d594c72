"""Benchmarks the next turn of a long conversation: cold, warm, after a switch, and restored from disk.

The history is text, so that the whole turn is measured: template, tokenizer, planning and prefill.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvchat.bench.chat import Chat
from kvchat.bench.rows import Row, Runner
from kvchat.cache.disk.disk_store import DiskStore
from kvchat.contract import Drop, PromptMessage, TurnFinished
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from kvchat.validation.bounds import INT64

RUNS = 5
COLD_RUNS = 3
"""A cold run prefills the whole history and takes longest."""
PAIRS = 11
"""Pairs of a warm turn and one after a switch: their difference is small, so it needs more runs."""
ANSWER_TOKENS = 2
ROOM = 160
"""Tokens after the context for the measured turns: five turns."""
RESUME_CASES = 3
"""Notes per context."""
QUESTION = "How long does the drive over the first pass take?"
SENTENCE = "The drive over pass {} takes {} hours, and the train takes two hours more."

MAIN, OTHER = "main", "other"


def resume_rows(loaded: LoadedModel, context: int, runner: Runner) -> Iterator[Row]:
    """Rows for the next turn of a conversation of `context` tokens, one for each state of its cache."""
    with tempfile.TemporaryDirectory(prefix="kvchat-bench-") as folder:
        yield from _resume_rows(loaded, context, Path(folder), runner)


def _resume_rows(loaded: LoadedModel, context: int, folder: Path, runner: Runner) -> Iterator[Row]:
    history = history_of(loaded, context)
    engine = _engine(loaded, folder)
    runner.note(f"a turn after {context:,} tokens, cold")
    yield _row(context, "cold", runner.repeated(lambda: _cold(engine, history), COLD_RUNS))
    chat, other = Chat(engine, MAIN, ANSWER_TOKENS, list(history)), Chat(engine, OTHER, ANSWER_TOKENS)
    before, after = (chat.ask(QUESTION).stats for _ in range(2))
    pairs, restores = rounds(
        loaded.facts.context_limit - after.kv_tokens, after.prompt_tokens - before.prompt_tokens
    )
    runner.note(f"a turn after {context:,} tokens, warm and switched to")
    # alternating, so that both see the same machine load and the same growing history
    both = runner.repeated(lambda: (chat.ask(QUESTION), _after(other, chat)), pairs)
    yield _row(context, "warm", [warm for warm, _ in both])
    yield _row(context, "switched", [switched for _, switched in both])
    engine.close()
    runner.note(f"a turn after {context:,} tokens, restored from disk")
    restored = runner.repeated(lambda: _restored(loaded, folder, chat.messages), restores)
    yield _row(context, "restored", restored)


def rounds(room: int, growth: int) -> tuple[int, int]:
    """(pairs of a warm turn and one after a switch, restores) that fit into the context.

    Args:
        room: free tokens of the context.
        growth: tokens by which each turn grows the conversation.
    """
    turns = room // max(growth, 1)
    restores = min(RUNS, max(1, turns // 3))
    return min(PAIRS, max(1, (turns - restores) // 2)), restores


def history_of(loaded: LoadedModel, context: int) -> list[PromptMessage]:
    """Two messages of about `context` tokens."""
    count = context // len(loaded.tokenizer.encode(SENTENCE.format(100, 3)).ids)
    text = " ".join(SENTENCE.format(i, i % 9 + 1) for i in range(count))
    return [PromptMessage("user", text), PromptMessage("assistant", "I have read it.")]


def _engine(loaded: LoadedModel, folder: Path) -> LocalEngine:
    return LocalEngine(loaded, disk=DiskTier(DiskStore(folder, INT64)))


def _cold(engine: LocalEngine, history: Sequence[PromptMessage]) -> TurnFinished:
    engine.command(Drop(MAIN))
    return Chat(engine, MAIN, ANSWER_TOKENS, list(history)).ask(QUESTION)


def _after(other: Chat, chat: Chat) -> TurnFinished:
    other.ask(QUESTION)
    return chat.ask(QUESTION)


def _restored(loaded: LoadedModel, folder: Path, messages: list[PromptMessage]) -> TurnFinished:
    """The first turn of a new engine, with the saved files removed from the page cache."""
    for path in folder.rglob("*.safetensors"):
        _drop_from_page_cache(path)
    engine = _engine(loaded, folder)
    finished = Chat(engine, MAIN, ANSWER_TOKENS, messages).ask(QUESTION)
    engine.close()
    return finished


def _drop_from_page_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _row(context: int, mode: str, turns: Sequence[TurnFinished]) -> Row:
    """`mode` is `cold`, `warm`, `switched` (after a turn of another conversation) or `restored`."""
    stats = [turn.stats for turn in turns]
    ttft, read = statistics.median(each.ttft_s for each in stats), stats[-1].prefilled_tokens
    return Row(
        "restore",
        context,
        mode,
        read / ttft,
        runs=len(turns),
        ttft_s=ttft,
        read_tokens=read,
        kv_bytes=stats[-1].kv_bytes,
        restore_s=statistics.median(each.restore_s for each in stats) or None,
    )
