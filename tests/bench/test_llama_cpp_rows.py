"""The script that measures llama.cpp gives rows that `kvchat bench --peers` can compare."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from kvchat.bench import prefill_decode, run
from kvchat.bench.report import ratios, read_peers
from tests.perf import llama_cpp_rows


class FakeLlama:
    """Counts tokens as llama.cpp's bindings do; answers every question with three pieces."""

    def __init__(self, *_: object, **__: object) -> None:
        self.n_tokens = 0
        self.read: list[tuple[int, int]] = []
        """(tokens cached before, tokens read) of every `eval`."""

    def n_vocab(self) -> int:
        return 1000

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, ids: Sequence[int]) -> None:
        self.read.append((self.n_tokens, len(ids)))
        self.n_tokens += len(ids)

    def create_chat_completion(self, messages: Sequence[object], **_: object) -> Iterator[dict[str, object]]:
        self.n_tokens += 10 * len(messages)
        for piece in (None, "a", "b", "c"):
            yield {"choices": [{"delta": {"content": piece} if piece else {"role": "assistant"}}]}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    """What the script prints."""
    bindings = SimpleNamespace(Llama=FakeLlama, __version__="0.0")
    monkeypatch.setitem(sys.modules, "llama_cpp", bindings)
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    monkeypatch.setattr(sys, "argv", ["rows", str(gguf), "--contexts", "24,48", "--turns", "2"])
    llama_cpp_rows.main()
    return capsys.readouterr().out


def test_the_rows_are_those_that_bench_compares(printed: str, tmp_path: Path) -> None:
    file = tmp_path / "llama.json"
    file.write_text(printed, encoding="utf-8")
    engine, rows = read_peers(file)
    assert engine == "llama.cpp"
    console = Console(width=120)
    with console.capture() as shown:
        console.print(ratios(rows, engine, rows))
    cases = [line.split()[1:-1] for line in shown.get().splitlines() if "1.00 ×" in line]
    assert len(cases) == 2 * (2 + 2 * len(llama_cpp_rows.SHORT_TURNS)) + 2 * 2
    assert {row["case"] for row in rows} == {"prefill", "short turn", "decode", "turn"}


def test_every_measurement_begins_with_the_cache_that_it_names() -> None:
    model = FakeLlama()
    rows = list(llama_cpp_rows.model_rows(model, 24))
    runs, short = llama_cpp_rows.PREFILL_RUNS, llama_cpp_rows.SHORT_RUNS
    assert model.read[:runs] == [(0, 24)] * runs
    assert model.read[runs : runs + 2 * short] == [(24, 16)] * short + [(24, 64)] * short
    assert model.read[runs + 2 * short] == (24, 1)
    assert [row["case"] for row in rows] == ["prefill", "short turn", "short turn", "decode"]


def test_questions_and_lengths_are_those_of_bench() -> None:
    assert llama_cpp_rows.QUESTIONS == run.QUESTIONS
    assert llama_cpp_rows.SHORT_TURNS == prefill_decode.SHORT_TURNS
    assert llama_cpp_rows.STEPS == prefill_decode.STEPS


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rows", "gone.gguf"])
    with pytest.raises(SystemExit, match=r"There is no file gone\.gguf"):
        llama_cpp_rows.main()


def test_the_output_is_json_of_the_shape_of_bench(printed: str) -> None:
    measured = json.loads(printed)
    assert {"engine", "model", "threads", "rows"} <= set(measured)
    assert all({"case", "context", "mode", "tok_s"} <= set(row) for row in measured["rows"])
