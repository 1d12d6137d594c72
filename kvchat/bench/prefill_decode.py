"""Measures the model alone: reading a context, a short turn on top of one, and token after token.

Token ids are made up, and there is no template and no tokenizer in these figures.
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
"""Tokens generated for a median of decoding; without a cache one takes seconds."""
SHORT_TURNS = (16, 64)
"""New tokens of a turn whose history is cached: a short question, and a longer one."""


def warm_up(loaded: LoadedModel) -> None:
    """Reads and writes a little: the first of everything is slow."""
    reader = loaded.reader(loaded.new_kv())
    for ids in (tokens(loaded, 256), *([token] for token in tokens(loaded, STEPS))):
        reader.read(ids)


def reading_rows(
    loaded: LoadedModel, context: int, precisions: Sequence[str], runner: Runner
) -> Iterator[Row]:
    """With a cache, with keys and values in other precisions, and without a cache."""
    yield from cached_rows(loaded, context, runner)
    for precision in precisions:
        runner.note(f"decode at {context:,} tokens, keys and values in {precision}")
        stored = _read(loaded, context, precision)[1]
        yield replace(_decode_row(loaded, context, stored, runner), kv=precision)
    runner.note(f"decode at {context:,} tokens, without a cache")
    uncached = loaded.uncached_reader()
    # the first step reads the context and a token more, as every later one does
    ids = iter([tokens(loaded, context + 1), *([token] for token in tokens(loaded, UNCACHED_STEPS))])
    steps = runner.warmed(lambda: _timed(uncached, next(ids)), UNCACHED_STEPS)
    yield Row("decode", context, "off", 1 / statistics.median(steps), runs=len(steps))


def cached_rows(
    loaded: LoadedModel, context: int, runner: Runner, weights: str | None = None
) -> Iterator[Row]:
    """A context is read, short turns are read on top of it, and tokens are generated after it."""
    named = f", weights in {weights}" if weights else ""
    runner.note(f"prefill of {context:,} tokens{named}")
    runs = runner.repeated(lambda: _read(loaded, context), PREFILL_RUNS)
    speed, kv = context / statistics.median(seconds for seconds, _ in runs), runs[-1][1]
    filled = kv.storage_bytes
    yield Row("prefill", context, "on", speed, runs=len(runs), kv_bytes=filled, weights=weights)
    for count in SHORT_TURNS:
        runner.note(f"{count} new tokens after {context:,} cached ones{named}")
        yield replace(_short_turn(loaded, context, kv, count, runner), weights=weights)
    runner.note(f"decode at {context:,} tokens{named}")
    yield replace(_decode_row(loaded, context, kv, runner), weights=weights, kv_bytes=None)


def tokens(loaded: LoadedModel, count: int) -> list[int]:
    """Made-up ids, spread over the vocabulary; speed doesn't depend on which they are."""
    size = min(40_000, loaded.vocabulary // 2)
    return [(1000 + i * 7919) % size for i in range(count)]


def _read(loaded: LoadedModel, count: int, precision: str = "auto") -> tuple[float, ConversationKV]:
    """(seconds to read `count` tokens in chunks, the cache they filled)."""
    kv = loaded.new_kv(precision)
    reader, ids = loaded.reader(kv), tokens(loaded, count)
    started = time.perf_counter()
    for start in range(0, count, PREFILL_CHUNK):
        reader.read(ids[start : start + PREFILL_CHUNK])
    return time.perf_counter() - started, kv


def _short_turn(loaded: LoadedModel, context: int, kv: ConversationKV, count: int, runner: Runner) -> Row:
    """Until the first token is known; the cache is cropped to the context again after every run."""
    kv.checkpoint()  # where a recurrent model can go back to
    reader, ids = loaded.reader(kv), tokens(loaded, count)

    def measure() -> float:
        seconds = _timed(reader, ids)
        kv.truncate(context)
        return seconds

    runs = runner.warmed(measure, SHORT_RUNS)
    ttft = statistics.median(runs)
    return Row("short turn", context, "on", count / ttft, runs=len(runs), ttft_s=ttft, read_tokens=count)


def _decode_row(loaded: LoadedModel, context: int, kv: ConversationKV, runner: Runner) -> Row:
    """One token at a time, after what is cached."""
    reader, ids, held = loaded.reader(kv), iter(tokens(loaded, STEPS + 1)), kv.storage_bytes
    steps = runner.warmed(lambda: _timed(reader, [next(ids)]), STEPS)
    speed = 1 / statistics.median(steps)
    return Row("decode", context, "on", speed, runs=len(steps), kv_bytes=held)


def _timed(reader: Reader, ids: Sequence[int]) -> float:
    """Seconds until these ids are read and the most probable next one is known."""
    started = time.perf_counter()
    reader.read(ids)[-1].argmax().item()
    return time.perf_counter() - started
