"""Benchmarks of the model alone: prefill, a short prefill on a cached context, and decode.

Uses synthetic token ids; templates and tokenizers are not measured.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvchat.bench.rows import Row, Runner
from kvchat.cache.kv_cache import ConversationKV
from kvchat.engine.model.forward import Reader
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.turn import PREFILL_CHUNK

PREFILL_RUNS, SHORT_RUNS = 3, 5
STEPS, UNCACHED_STEPS = 32, 3
"""Decode steps per median; a step without a cache takes seconds."""
SHORT_TURNS = (16, 64)
"""New tokens of a turn with a cached history: a short question and a longer one."""


def warm_up(loaded: LoadedModel) -> None:
    """Runs a prefill and some decode steps: the first passes are slow."""
    reader = loaded.reader(loaded.new_kv())
    for ids in (tokens(loaded, 256), *([token] for token in tokens(loaded, STEPS))):
        reader.read(ids)


def context_rows(
    loaded: LoadedModel, context: int, precisions: Sequence[str], runner: Runner
) -> Iterator[Row]:
    """Rows with a cache, decode with each KV precision, and decode without a cache."""
    yield from cached_rows(loaded, context, runner)
    for precision in precisions:
        runner.note(f"decode at {context:,} tokens, keys and values in {precision}")
        kv = _prefill(loaded, context, precision)[1]
        yield replace(_decode_row(loaded, context, kv, runner), kv=precision)
    runner.note(f"decode at {context:,} tokens, without a cache")
    uncached = loaded.uncached_reader()
    # every step recomputes the context: the first one gets it as its ids
    ids = iter([tokens(loaded, context + 1), *([token] for token in tokens(loaded, UNCACHED_STEPS))])
    steps = runner.warmed(lambda: _timed(uncached, next(ids)), UNCACHED_STEPS)
    yield Row("decode", context, "off", 1 / statistics.median(steps), runs=len(steps))


def cached_rows(
    loaded: LoadedModel, context: int, runner: Runner, weights: str | None = None
) -> Iterator[Row]:
    """Rows of prefill, short turns and decode with a cached context of `context` tokens."""
    named = f", weights in {weights}" if weights else ""
    runner.note(f"prefill of {context:,} tokens{named}")
    runs = runner.repeated(lambda: _prefill(loaded, context), PREFILL_RUNS)
    speed, kv = context / statistics.median(seconds for seconds, _ in runs), runs[-1][1]
    filled = kv.storage_bytes
    yield Row("prefill", context, "on", speed, runs=len(runs), kv_bytes=filled, weights=weights)
    for count in SHORT_TURNS:
        runner.note(f"{count} new tokens after {context:,} cached ones{named}")
        yield replace(_short_turn(loaded, context, kv, count, runner), weights=weights)
    runner.note(f"decode at {context:,} tokens{named}")
    yield replace(_decode_row(loaded, context, kv, runner), weights=weights, kv_bytes=None)


def tokens(loaded: LoadedModel, count: int) -> list[int]:
    """Synthetic ids, spread over the vocabulary; speed doesn't depend on their values."""
    size = min(40_000, loaded.vocabulary // 2)
    return [(1000 + i * 7919) % size for i in range(count)]


def _prefill(loaded: LoadedModel, count: int, precision: str = "auto") -> tuple[float, ConversationKV]:
    """(seconds to prefill `count` tokens in chunks, the filled cache)."""
    kv = loaded.new_kv(precision)
    reader, ids = loaded.reader(kv), tokens(loaded, count)
    started = time.perf_counter()
    for start in range(0, count, PREFILL_CHUNK):
        reader.read(ids[start : start + PREFILL_CHUNK])
    return time.perf_counter() - started, kv


def _short_turn(loaded: LoadedModel, context: int, kv: ConversationKV, count: int, runner: Runner) -> Row:
    """Time until the first token; the cache is truncated to the context after every run."""
    kv.checkpoint()  # recurrent states can be truncated to checkpoints only
    reader, ids = loaded.reader(kv), tokens(loaded, count)

    def measure() -> float:
        seconds = _timed(reader, ids)
        kv.truncate(context)
        return seconds

    runs = runner.warmed(measure, SHORT_RUNS)
    ttft = statistics.median(runs)
    return Row("short turn", context, "on", count / ttft, runs=len(runs), ttft_s=ttft, read_tokens=count)


def _decode_row(loaded: LoadedModel, context: int, kv: ConversationKV, runner: Runner) -> Row:
    """Decode rate, one token at a time, with the cached context."""
    reader, ids, size = loaded.reader(kv), iter(tokens(loaded, STEPS + 1)), kv.storage_bytes
    steps = runner.warmed(lambda: _timed(reader, [next(ids)]), STEPS)
    speed = 1 / statistics.median(steps)
    return Row("decode", context, "on", speed, runs=len(steps), kv_bytes=size)


def _timed(reader: Reader, ids: Sequence[int]) -> float:
    """Seconds of one forward pass over `ids` and the argmax of its last logits."""
    started = time.perf_counter()
    reader.read(ids)[-1].argmax().item()
    return time.perf_counter() - started
