"""Measures what the KV cache is worth on this machine: prefill, decode and turns, in the three modes.

Warm-up first, then medians over as many runs as there is time for. The chat of the `turn` rows is answered
once with the cache on; the other modes get the same questions and the same answers as history, so that every
mode reads the same prompts.
"""

import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import psutil
import torch
import transformers

from kvchat.bench.prefill_decode import SHORT_TURNS, cached_rows, reading_rows, warm_up
from kvchat.bench.resume import HISTORY_CASES, ROOM, history_rows
from kvchat.bench.rows import Row, Runner
from kvchat.contract import CacheMode, PromptMessage, Sampling, TurnFailed, TurnFinished, TurnRequest
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.speculative import PromptLookup
from kvchat.engine.turn_timer import memory_in_use
from kvchat.errors import KvchatError, reason

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
DRAFT_CASES = (("copies", COPY), ("open", OPEN))
DRAFTERS = (("off", lambda: None), ("lookup", PromptLookup))
PROBE_TOKENS = {CacheMode.TURN: 8, CacheMode.OFF: 3}
"""Tokens generated per turn where only the time to the first one is compared."""


class Measured(TypedDict):
    """What `--json` prints."""

    machine: dict[str, object]
    model: dict[str, object]
    rss_bytes: int
    """Memory of this process with the model loaded, before anything was cached."""
    rows: list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is to be measured."""

    contexts: Sequence[int]
    """Cached tokens to measure at."""
    turns: int
    answer_tokens: int
    """Of the chat and each of its answers."""
    fill: bool = False
    """Whether no answer of the chat ends before `answer_tokens`, so that it reaches a known length."""
    precisions: Sequence[str] = ()
    """Of keys and values, to decode with besides the model's own."""
    weights: Mapping[str, Callable[[], LoadedModel]] = field(default_factory=dict)
    """The same model with its weights in other precisions."""

    @property
    def cases(self) -> int:
        """How many times a case is announced."""
        short = len(SHORT_TURNS)
        at_each = 3 + short + len(self.precisions) + (2 + short) * len(self.weights) + HISTORY_CASES
        return at_each * len(self.contexts) + len(DRAFT_CASES) * len(DRAFTERS) + 3 * self.turns


def run_bench(loaded: LoadedModel, plan: BenchPlan, runner: Runner) -> Measured:
    """All measurements, in the shape that `--json` prints.

    Raises:
        KvchatError: a context is longer than the model's.
    """
    limit = loaded.facts.context_limit
    if too_long := [context for context in plan.contexts if context + ROOM > limit]:
        raise KvchatError(
            f"{loaded.facts.name} holds {limit:,} tokens, not {max(too_long):,} and {ROOM} for what follows."
        )
    rss = memory_in_use()
    return {
        "machine": machine(),
        "model": asdict(loaded.facts),
        "rss_bytes": rss,
        "rows": [
            {k: v for k, v in asdict(row).items() if v is not None} for row in _rows(loaded, plan, runner)
        ],
    }


def _rows(loaded: LoadedModel, plan: BenchPlan, runner: Runner) -> Iterator[Row]:
    warm_up(loaded)
    for context in plan.contexts:
        yield from reading_rows(loaded, context, plan.precisions, runner)
    yield from _draft_rows(loaded, runner)
    for context in plan.contexts:
        yield from history_rows(loaded, context, runner)
    chatting = replace(loaded, end_ids=frozenset()) if plan.fill else loaded
    yield from _turn_rows(chatting, plan.turns, plan.answer_tokens, runner)
    for name, load in plan.weights.items():
        other = load()
        warm_up(other)
        for context in plan.contexts:
            yield from cached_rows(other, context, runner, name)
        other.unload()


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


def _draft_rows(loaded: LoadedModel, runner: Runner) -> Iterator[Row]:
    """An answer that copies, and one that doesn't, with drafts and without; greedy: they say the same."""
    for case, question in DRAFT_CASES:
        for mode, new_drafter in DRAFTERS:
            runner.note(f"an answer, {case}, drafts {mode}")
            engine = LocalEngine(loaded, new_drafter=new_drafter)
            prompt = (PromptMessage("user", question),)
            ask = partial(_turn, engine, prompt, CacheMode.TURN, DRAFT_TOKENS)
            runs = [finished.stats for finished in runner.repeated(ask, DRAFT_RUNS)]
            last = runs[-1]
            yield Row(
                f"draft, {case}",
                last.prompt_tokens + last.generated_tokens,
                mode,
                statistics.median(run.decode_tok_s for run in runs),
                runs=len(runs),
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
        raise KvchatError(f"{file} can't be written: {reason(error)}") from error


def _turn_rows(loaded: LoadedModel, turns: int, answer_tokens: int, runner: Runner) -> Iterator[Row]:
    engine = LocalEngine(loaded)
    history: list[PromptMessage] = []
    prompts: list[tuple[PromptMessage, ...]] = []
    for number in range(1, turns + 1):
        runner.note(f"turn {number} of {turns}")
        history.append(PromptMessage("user", QUESTIONS[(number - 1) % len(QUESTIONS)]))
        prompts.append(tuple(history))
        finished = _turn(engine, prompts[-1], CacheMode.ON, answer_tokens)
        history.append(PromptMessage("assistant", finished.text, finished.token_ids, finished.tokenizer))
        yield _turn_row(number, finished)
    for mode, probe in PROBE_TOKENS.items():
        for number, prompt in enumerate(prompts, start=1):
            runner.note(f"turn {number} of {turns}, cache {mode.value}")
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
