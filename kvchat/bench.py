"""Measures what the KV cache is worth on this machine: prefill, decode and turns, in the three modes.

Warm-up first, then medians. The chat of the `turn` rows is answered once with the cache on; the other modes
get the same questions and the same answers as history, so that every mode reads the same prompts.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

import psutil
import torch
import transformers

from kvchat.bench_history import HistoryRow, history_rows
from kvchat.cache.kv import ConversationKV
from kvchat.contract import CacheMode, PromptMessage, Sampling, TurnFailed, TurnFinished, TurnRequest
from kvchat.engine.draft import PromptLookup
from kvchat.engine.engine import LocalEngine
from kvchat.engine.forward import Reader
from kvchat.engine.load import LoadedModel
from kvchat.engine.meter import memory_in_use
from kvchat.engine.turn import PREFILL_CHUNK
from kvchat.errors import KvchatError

QUESTIONS = (
    "Name three rivers of Europe.",
    "Which of them is the longest?",
    "Write two sentences about it.",
    "Now make it rhyme.",
    "Give me a short recipe for bread.",
    "How long does it bake?",
    "List the tools I need.",
    "Explain why yeast makes it rise.",
)
LIST = """\
- apples from the market
- two litres of milk
- bread with seeds
- a bar of dark chocolate
- green tea
- three onions
- olive oil from Crete
- a bunch of basil
- paper towels
- salt and black pepper
- a pound of red lentils
- lemons
- butter for the cake
- brown sugar
- six eggs
- a jar of plum jam
"""
COPY = f"Repeat this list:\n\n{LIST}"
OPEN = "Tell me a story about a lighthouse keeper who collects lost sounds."
DRAFT_TOKENS, DRAFT_RUNS = 128, 3
DECODE_STEPS = {CacheMode.ON: 32, CacheMode.OFF: 3}
"""Steps a decode median is taken over; without a cache one step takes seconds."""
PROBE_TOKENS = {CacheMode.TURN: 8, CacheMode.OFF: 3}
"""Tokens generated per turn where only the time to the first one is compared."""
PREFILL_RUNS = 3

Note = Callable[[str], None]


class Measured(TypedDict):
    """What `--json` prints."""

    machine: dict[str, object]
    model: dict[str, object]
    rss_bytes: int
    """Memory of this process with the model loaded, before anything was cached."""
    rows: list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; None where it doesn't apply."""

    case: str
    context: int
    mode: str
    tok_s: float
    """Median over the runs or steps."""
    ttft_s: float | None = None
    turn: int | None = None
    read_tokens: int | None = None
    kv_bytes: int | None = None
    kv: str | None = None
    """Precision of keys and values, where another than the model's own was asked for."""
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    restore_s: float | None = None
    """Of `ttft_s`, the time that reading the cache from disk and verifying it took."""


def run_bench(
    loaded: LoadedModel,
    contexts: Sequence[int],
    *,
    turns: int,
    answer_tokens: int,
    fill: bool,
    precisions: Sequence[str],
    note: Note,
) -> Measured:
    """All measurements, in the shape that `--json` prints.

    `precisions` are those of keys and values to decode with besides the model's own.
    With `fill` no answer of the chat ends before `answer_tokens`, so that it reaches a known length.

    Raises:
        KvchatError: a context is longer than the model's.
    """
    if too_long := [c for c in contexts if c + max(DECODE_STEPS.values()) > loaded.facts.context_limit]:
        raise KvchatError(
            f"{loaded.facts.name} holds {loaded.facts.context_limit:,} tokens, not {max(too_long):,}."
        )
    chatting = replace(loaded, end_ids=frozenset()) if fill else loaded
    rss = memory_in_use()
    rows = [*_raw_rows(loaded, contexts, precisions, note), *_draft_rows(loaded, note)]
    rows += [_restore_row(row) for row in history_rows(loaded, contexts, note)]
    rows += _turn_rows(chatting, turns, answer_tokens, note)
    return {
        "machine": machine(),
        "model": asdict(loaded.facts),
        "rss_bytes": rss,
        "rows": [{k: v for k, v in asdict(row).items() if v is not None} for row in rows],
    }


def _restore_row(row: HistoryRow) -> Row:
    return Row(
        "restore",
        row.context,
        row.how,
        row.read_tokens / row.ttft_s,
        ttft_s=row.ttft_s,
        read_tokens=row.read_tokens,
        kv_bytes=row.kv_bytes,
        restore_s=row.restore_s or None,
    )


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a kernel file, read line by line
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.processor())
    except OSError:
        return platform.processor()


def _raw_rows(
    loaded: LoadedModel, contexts: Iterable[int], precisions: Sequence[str], note: Note
) -> Iterator[Row]:
    _decode(loaded.reader(_prefill(loaded, 256)[1]), loaded.vocabulary, CacheMode.ON)
    for context in contexts:
        note(f"prefill and decode at {context:,} tokens")
        runs = [_prefill(loaded, context) for _ in range(PREFILL_RUNS)]
        kv = runs[-1][1]
        yield Row(
            "prefill",
            context,
            "on",
            context / statistics.median(s for s, _ in runs),
            kv_bytes=kv.storage_bytes,
        )
        yield Row("decode", context, "on", _decode(loaded.reader(kv), loaded.vocabulary, CacheMode.ON))
        for precision in precisions:
            note(f"decode at {context:,} tokens, keys and values in {precision}")
            stored = _prefill(loaded, context, precision)[1]
            speed = _decode(loaded.reader(stored), loaded.vocabulary, CacheMode.ON)
            yield Row("decode", context, "on", speed, kv_bytes=stored.storage_bytes, kv=precision)
        note(f"decode without a cache at {context:,} tokens")
        uncached = loaded.uncached_reader()
        uncached.read(tokens(loaded, context))
        yield Row("decode", context, "off", _decode(uncached, loaded.vocabulary, CacheMode.OFF))


def tokens(loaded: LoadedModel, count: int) -> list[int]:
    """Made-up ids, spread over the vocabulary; speed doesn't depend on which they are."""
    size = min(40_000, loaded.vocabulary // 2)
    return [(1000 + i * 7919) % size for i in range(count)]


def _prefill(loaded: LoadedModel, count: int, precision: str = "auto") -> tuple[float, ConversationKV]:
    """(seconds to read `count` tokens in chunks, the cache they filled)."""
    kv = loaded.new_kv(precision)
    reader, ids = loaded.reader(kv), tokens(loaded, count)
    started = time.perf_counter()
    for start in range(0, count, PREFILL_CHUNK):
        reader.read(ids[start : start + PREFILL_CHUNK])
    return time.perf_counter() - started, kv


def _decode(reader: Reader, vocabulary: int, mode: CacheMode) -> float:
    """Median tokens a second, one token at a time, after a step of warm-up."""
    steps = []
    for i in range(DECODE_STEPS[mode] + 1):
        started = time.perf_counter()
        reader.read([(500 + i) % vocabulary])
        steps.append(time.perf_counter() - started)
    return 1 / statistics.median(steps[1:])


def _draft_rows(loaded: LoadedModel, note: Note) -> Iterator[Row]:
    """An answer that copies, and one that doesn't, with drafts and without; greedy: they say the same."""
    for case, question in (("copies", COPY), ("open", OPEN)):
        for mode, new_drafter in (("off", lambda: None), ("lookup", PromptLookup)):
            note(f"an answer, {case}, drafts {mode}")
            engine = LocalEngine(loaded, new_drafter=new_drafter)
            prompt = (PromptMessage("user", question),)
            runs = [_turn(engine, prompt, CacheMode.TURN, DRAFT_TOKENS).stats for _ in range(DRAFT_RUNS)]
            last = runs[-1]
            yield Row(
                f"draft, {case}",
                last.prompt_tokens + last.generated_tokens,
                mode,
                statistics.median(run.decode_tok_s for run in runs),
                drafted_tokens=last.drafted_tokens,
                accepted_tokens=last.accepted_tokens,
            )


def profile_turn(loaded: LoadedModel, file: Path) -> None:
    """Writes a trace of one turn that chrome://tracing and Perfetto open.

    Raises:
        KvchatError: the file can't be written.
    """
    engine = LocalEngine(loaded)
    prompt = (PromptMessage("user", OPEN),)
    _turn(engine, prompt, CacheMode.ON, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _turn(engine, (*prompt, PromptMessage("assistant", "Yes."), *prompt), CacheMode.ON, 16)
    try:
        profiler.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:
        raise KvchatError(f"{file} can't be written: {error}") from error


def _turn_rows(loaded: LoadedModel, turns: int, answer_tokens: int, note: Note) -> Iterator[Row]:
    engine = LocalEngine(loaded)
    history: list[PromptMessage] = []
    prompts: list[tuple[PromptMessage, ...]] = []
    for number in range(1, turns + 1):
        note(f"turn {number} of {turns}")
        history.append(PromptMessage("user", QUESTIONS[(number - 1) % len(QUESTIONS)]))
        prompts.append(tuple(history))
        finished = _turn(engine, prompts[-1], CacheMode.ON, answer_tokens)
        history.append(PromptMessage("assistant", finished.text, finished.token_ids, finished.tokenizer))
        yield _turn_row(number, finished)
    for mode, probe in PROBE_TOKENS.items():
        for number, prompt in enumerate(prompts, start=1):
            note(f"turn {number} of {turns}, cache {mode.value}")
            yield _turn_row(number, _turn(engine, prompt, mode, probe))


def _turn(
    engine: LocalEngine, prompt: tuple[PromptMessage, ...], mode: CacheMode, max_tokens: int
) -> TurnFinished:
    request = TurnRequest("bench", "bench", prompt, mode, Sampling(max_tokens=max_tokens))
    *_, last = engine.turn(request)
    if isinstance(last, TurnFailed):
        raise KvchatError(last.reason)
    assert isinstance(last, TurnFinished)
    return last


def _turn_row(number: int, finished: TurnFinished) -> Row:
    stats = finished.stats
    return Row(
        case="turn",
        context=stats.prompt_tokens + stats.generated_tokens,
        mode=stats.cache_mode,
        tok_s=stats.decode_tok_s,
        ttft_s=stats.ttft_s,
        turn=number,
        read_tokens=stats.prefilled_tokens,
        kv_bytes=stats.kv_bytes,
    )
