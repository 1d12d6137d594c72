"""Measures llama.cpp and prints rows for `kvchat bench --peers`, in the shape of `kvchat bench --json`.

Needs nothing of kvchat, so that it runs in an environment of its own:

    python3 -m venv .venv-llama
    CMAKE_ARGS=-DGGML_NATIVE=ON .venv-llama/bin/pip install llama-cpp-python==0.3.36
    .venv-llama/bin/python tests/perf/llama_cpp_rows.py MODEL.gguf --threads 2 > llama.json
    kvchat bench --threads 2 --peers llama.json

Measure both right after each other, with nothing else running, and compare ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_cpp import Llama

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
"""Those of `kvchat bench`; a test compares them."""
SHORT_TURNS = (16, 64)
PREFILL_RUNS, SHORT_RUNS, STEPS = 3, 5, 32
CHUNK = 512
Row = dict[str, object]


def token_ids(vocabulary: int, count: int) -> list[int]:
    """The made-up ids of `kvchat bench`, spread over the vocabulary."""
    size = min(40_000, vocabulary // 2)
    return [(1000 + i * 7919) % size for i in range(count)]


def seconds_to_read(model: Llama, ids: Sequence[int]) -> float:
    """Reads `ids` after what is cached. llama.cpp computes logits of the last one only."""
    started = time.perf_counter()
    model.eval(ids)
    return time.perf_counter() - started


def crop(model: Llama, tokens: int) -> None:
    """Takes the cache back to its first `tokens`; the next `eval` drops what lies behind them."""
    model.n_tokens = tokens


def model_rows(model: Llama, context: int) -> Iterator[Row]:
    """Prefill of a context, short turns on top of it, and one token after another."""
    ids = token_ids(model.n_vocab(), context)
    runs = []
    for _ in range(PREFILL_RUNS):
        model.reset()
        runs.append(seconds_to_read(model, ids))
    yield {"case": "prefill", "context": context, "mode": "on", "tok_s": context / statistics.median(runs)}
    for count in SHORT_TURNS:
        runs = []
        for _ in range(SHORT_RUNS):
            runs.append(seconds_to_read(model, ids[:1] * count))
            crop(model, context)
        ttft = statistics.median(runs)
        short = {"case": "short turn", "context": context, "mode": "on", "read_tokens": count}
        yield {**short, "tok_s": count / ttft, "ttft_s": ttft}
    steps = [seconds_to_read(model, [token]) for token in token_ids(model.n_vocab(), STEPS)]
    yield {"case": "decode", "context": context, "mode": "on", "tok_s": 1 / statistics.median(steps)}


def chat_rows(model: Llama, turns: int, answer_tokens: int) -> Iterator[Row]:
    """A chat; llama.cpp reuses the longest common prefix of what it read before."""
    model.reset()
    history: list[dict[str, str]] = []
    for turn, question in enumerate(QUESTIONS[:turns], start=1):
        history.append({"role": "user", "content": question})
        started, times, pieces = time.perf_counter(), [], []
        for chunk in model.create_chat_completion(
            messages=history, stream=True, max_tokens=answer_tokens, temperature=0
        ):
            if piece := chunk["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
                pieces.append(piece)
        if not times:
            raise SystemExit(f"llama.cpp gave no answer to {question!r}: is the file a chat model?")
        history.append({"role": "assistant", "content": "".join(pieces)})
        begin, *rest = times if len(times) > 1 else (started, *times)
        speed = len(rest) / (rest[-1] - begin)
        row: Row = {"case": "turn", "turn": turn, "context": model.n_tokens, "mode": "on"}
        yield {**row, "ttft_s": times[0] - started, "tok_s": speed}


def measured(model: Llama, contexts: Sequence[int], turns: int, answer_tokens: int) -> list[Row]:
    """All rows, after a warm-up."""
    seconds_to_read(model, token_ids(model.n_vocab(), 256))
    rows = [row for context in contexts for row in model_rows(model, context)]
    return rows + list(chat_rows(model, turns, answer_tokens))


def main() -> None:
    """Reads the flags, measures, and prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", default="256,1024,4096")
    parser.add_argument("--turns", type=int, default=len(QUESTIONS))
    parser.add_argument("--answer-tokens", type=int, default=96)
    given = parser.parse_args()
    if not given.gguf.is_file():
        raise SystemExit(f"There is no file {given.gguf}.")
    contexts = [int(each) for each in given.contexts.split(",")]
    import llama_cpp

    model = llama_cpp.Llama(
        str(given.gguf),
        n_ctx=max([*contexts, given.turns * (given.answer_tokens + 64)]) + 256,
        n_batch=CHUNK,
        n_threads=given.threads,
        n_threads_batch=given.threads,
        verbose=False,
    )
    engine = {"engine": "llama.cpp", "version": llama_cpp.__version__, "threads": given.threads}
    rows = measured(model, contexts, given.turns, given.answer_tokens)
    sys.stdout.write(json.dumps({**engine, "model": given.gguf.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
