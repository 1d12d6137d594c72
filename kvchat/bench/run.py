"""Runs all benchmarks of the KV cache: prefill, decode and turns, in the three cache modes.

A warm-up, then medians over as many runs as the time limit allows. The chat of the `turn` rows is generated
once, with the cache on; the other modes get its prompts, so that every mode reads the same tokens.
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

from kvchat.bench.chat import Chat, run_turn
from kvchat.bench.prefill_decode import SHORT_TURNS, cached_rows, context_rows, warm_up
from kvchat.bench.resume import RESUME_CASES, ROOM, resume_rows
from kvchat.bench.rows import Row, Runner
from kvchat.contract import CacheMode, PromptMessage, Sampling, TurnFinished, TurnRequest
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
CONVERSATION = "bench"
COPY = f"Repeat this list:\n\n{LIST}"
OPEN = "Tell me a story about a lighthouse keeper who collects lost sounds."
DRAFT_TOKENS, DRAFT_RUNS = 128, 3
DRAFT_CASES = (("copies", COPY), ("open", OPEN))
DRAFTERS = (("off", lambda: None), ("lookup", PromptLookup))
PROBE_TOKENS = {CacheMode.TURN: 8, CacheMode.OFF: 3}
"""Tokens generated per turn in the modes of which only the TTFT is compared."""


class Measured(TypedDict):
    """The output of `--json`."""

    machine: dict[str, object]
    model: dict[str, object]
    rss_bytes: int
    """Memory of this process with the model loaded and empty caches."""
    rows: list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure."""

    contexts: Sequence[int]
    """Context lengths in tokens."""
    turns: int
    """Of the chat."""
    answer_tokens: int
    """Maximum length of the chat's answers."""
    fill: bool = False
    """Whether all answers of the chat get `answer_tokens` tokens: end-of-turn ids are ignored."""
    precisions: Sequence[str] = ()
    """Precisions of keys and values to decode with, besides the model's own."""
    weights: Mapping[str, Callable[[], LoadedModel]] = field(default_factory=dict)
    """Precision → function that loads the same model with weights in that precision."""

    @property
    def cases(self) -> int:
        """Number of notes."""
        short = len(SHORT_TURNS)
        at_each = 3 + short + len(self.precisions) + (2 + short) * len(self.weights) + RESUME_CASES
        return at_each * len(self.contexts) + len(DRAFT_CASES) * len(DRAFTERS) + 3 * self.turns


def run_bench(loaded: LoadedModel, options: BenchOptions, runner: Runner) -> Measured:
    """Runs all measurements.

    Raises:
        KvchatError: a context is longer than the model's.
    """
    limit = loaded.facts.context_limit
    if too_long := [context for context in options.contexts if context + ROOM > limit]:
        raise KvchatError(
            f"The context of {loaded.facts.name} is {limit:,} tokens; a measurement at {max(too_long):,} "
            f"needs {ROOM} more than that."
        )
    rss = memory_in_use()
    return {
        "machine": machine(),
        "model": asdict(loaded.facts),
        "rss_bytes": rss,
        "rows": [
            {k: v for k, v in asdict(row).items() if v is not None} for row in _rows(loaded, options, runner)
        ],
    }


def _rows(loaded: LoadedModel, options: BenchOptions, runner: Runner) -> Iterator[Row]:
    warm_up(loaded)
    for context in options.contexts:
        yield from context_rows(loaded, context, options.precisions, runner)
    yield from _draft_rows(loaded, runner)
    for context in options.contexts:
        yield from resume_rows(loaded, context, runner)
    chat_model = replace(loaded, end_ids=frozenset()) if options.fill else loaded
    yield from _turn_rows(chat_model, options.turns, options.answer_tokens, runner)
    for name, load in options.weights.items():
        other = load()
        warm_up(other)
        for context in options.contexts:
            yield from cached_rows(other, context, runner, name)
        other.unload()


def machine() -> dict[str, object]:
    """Hardware and versions of the measurement."""
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
    """Decode with and without drafts, for an answer that copies and one that doesn't.

    Greedy, so that the answers are equal with and without drafts.
    """
    for case, question in DRAFT_CASES:
        for mode, new_drafter in DRAFTERS:
            runner.note(f"an answer, {case}, drafts {mode}")
            engine = LocalEngine(loaded, new_drafter=new_drafter)
            prompt = (PromptMessage("user", question),)
            ask = partial(run_turn, engine, _request(prompt, CacheMode.TURN, DRAFT_TOKENS))
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
    """Writes a trace of one turn for chrome://tracing and Perfetto.

    Raises:
        KvchatError: the file can't be written.
    """
    engine = LocalEngine(loaded)
    prompt = (PromptMessage("user", OPEN),)
    run_turn(engine, _request(prompt, CacheMode.ON, 2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run_turn(engine, _request((*prompt, PromptMessage("assistant", "Yes."), *prompt), CacheMode.ON, 16))
    try:
        profiler.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:
        raise KvchatError(f"{file} can't be written: {reason(error)}") from error


def _turn_rows(loaded: LoadedModel, turns: int, answer_tokens: int, runner: Runner) -> Iterator[Row]:
    engine = LocalEngine(loaded)
    chat = Chat(engine, CONVERSATION, answer_tokens)
    for number in range(1, turns + 1):
        runner.note(f"turn {number} of {turns}")
        yield _turn_row(number, chat.ask(QUESTIONS[(number - 1) % len(QUESTIONS)]))
    for mode, probe in PROBE_TOKENS.items():
        for number in range(1, turns + 1):
            runner.note(f"turn {number} of {turns}, cache {mode.value}")
            prompt = tuple(chat.messages[: 2 * number - 1])
            yield _turn_row(number, run_turn(engine, _request(prompt, mode, probe)))


def _request(prompt: tuple[PromptMessage, ...], mode: CacheMode, max_tokens: int) -> TurnRequest:
    return TurnRequest("bench", CONVERSATION, prompt, mode, Sampling(max_tokens=max_tokens))


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
