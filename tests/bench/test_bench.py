"""`kvchat bench`: its rows, reports and plots."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kvchat.bench.report import answers, draw, ratios, read_peers, refuse_plot, report
from kvchat.bench.resume import rounds
from kvchat.bench.rows import Runner
from kvchat.bench.run import BenchOptions, Measured, profile_turn, run_bench
from kvchat.bench.terminal_plot import Curve, plot
from kvchat.cli.bench import ProgressLog
from kvchat.engine.model.loader import LoadedModel
from kvchat.errors import KvchatError


@pytest.fixture(scope="module")
def options(tiny: LoadedModel) -> BenchOptions:
    return BenchOptions([24, 48], 2, 4, fill=True, precisions=["int8"], weights={"bf16": lambda: tiny})


@pytest.fixture(scope="module")
def noted() -> list[str]:
    """The notes of the run."""
    return []


@pytest.fixture(scope="module")
def measured(tiny: LoadedModel, options: BenchOptions, noted: list[str]) -> Measured:
    return run_bench(tiny, options, Runner(noted.append, row_s=0))


def _printed(renderable: object, width: int = 160) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_every_case_has_a_row(measured: Measured) -> None:
    rows = measured["rows"]
    cases = {(row["case"], row["mode"], row.get("kv")) for row in rows if "weights" not in row}
    assert {
        ("prefill", "on", None),
        ("decode", "on", None),
        ("decode", "on", "int8"),
        ("decode", "off", None),
        ("draft, copies", "off", None),
        ("draft, copies", "lookup", None),
        ("restore", "restored", None),
        ("short turn", "on", None),
        ("turn", "on", None),
        ("turn", "turn", None),
        ("turn", "off", None),
    } <= cases
    assert all(float(str(row["tok_s"])) > 0 for row in rows)
    assert all(row["runs"] == 1 for row in rows)
    assert measured["rss_bytes"] > 0
    assert json.loads(json.dumps(measured))["rows"] == rows


def test_a_later_turn_prefills_only_new_tokens_with_the_cache_on(measured: Measured) -> None:
    read = {
        row["mode"]: int(str(row["read_tokens"]))
        for row in measured["rows"]
        if row["case"] == "turn" and row["turn"] == 2
    }
    assert read["on"] < read["turn"] == read["off"]


def test_short_turns_are_measured_at_each_context(measured: Measured) -> None:
    short = [row for row in measured["rows"] if row["case"] == "short turn" and "weights" not in row]
    assert [(row["context"], row["read_tokens"]) for row in short] == [(24, 16), (24, 64), (48, 16), (48, 64)]
    for row in short:
        new, first = int(str(row["read_tokens"])), float(str(row["ttft_s"]))
        assert row["tok_s"] == pytest.approx(new / first)


def test_rows_of_other_weights_have_their_precision(measured: Measured) -> None:
    cases = [(row["case"], row["context"]) for row in measured["rows"] if row.get("weights") == "bf16"]
    assert cases == [
        (case, n) for n in (24, 48) for case in ("prefill", "short turn", "short turn", "decode")
    ]


def test_every_case_is_noted(measured: Measured, options: BenchOptions, noted: list[str]) -> None:
    assert measured["rows"]
    assert len(noted) == options.cases
    assert "64 new tokens after 48 cached ones, weights in bf16" in noted


def test_the_progress_log_counts_cases(capsys: pytest.CaptureFixture[str]) -> None:
    announce = ProgressLog(10)
    announce("prefill")
    announce("decode")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\[ 1/10 \d:\d\d\] measuring: prefill\n\[ 2/10 \d:\d\d\] measuring: decode\n", err)


@pytest.mark.parametrize(
    ("row_s", "runs", "warmed"),
    [(0, [0], [0]), (5.9, [0], [0]), (6, [0, 1], [1]), (8.9, [0, 1], [1]), (100, [0, 1, 2, 3], [1, 2, 3])],
)
def test_runs_are_repeated_within_the_time_limit(row_s: float, runs: list[int], warmed: list[int]) -> None:
    """With a fake clock, by which each run takes three seconds."""

    def counted(repeat: Callable[[Runner, Callable[[], int]], list[int]]) -> list[int]:
        begun: list[int] = []

        def measure() -> int:
            begun.append(len(begun))
            return begun[-1]

        return repeat(Runner(lambda _words: None, row_s, lambda: 3.0 * len(begun)), measure)

    assert counted(lambda runner, measure: runner.repeated(measure, 4)) == runs
    assert counted(lambda runner, measure: runner.warmed(measure, 3)) == warmed


def test_measured_turns_fit_into_the_context() -> None:
    assert rounds(10**6, 25) == (11, 5)
    for room in (120, 192, 400, 700):
        pairs, restores = rounds(room, 25)
        assert min(pairs, restores) >= 1
        assert 25 * (2 * pairs + restores) <= room


def test_the_report_shows_every_row(measured: Measured) -> None:
    shown = _printed(report(measured["rows"], 80))
    assert shown.count("decode at 48") == 4
    assert "weights bf16" in shown
    assert "runs" in shown.splitlines()[0]
    assert "int8" in shown
    assert "restored" in shown


def test_the_report_fits_into_80_columns_without_colour(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = _printed(report(measured["rows"], 80), width=80)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "tok/s of an answer of 64 tokens with its TTFT" in shown
    assert "TTFT in seconds" in shown
    assert shown.count("o cache on   + cache turn   x cache off") == 2


def test_a_narrow_table_drops_optional_columns(measured: Measured) -> None:
    shown = _printed(report(measured["rows"], 60), width=60)
    assert shown.split("\n", 1)[0].split() == [
        "case",
        "cache",
        "turn",
        "context",
        "TTFT",
        "s",
        "tok/s",
        "runs",
    ]
    assert "…" not in shown


def test_the_rate_of_an_answer_includes_its_ttft() -> None:
    rows = [
        {"case": "prefill", "context": 100, "mode": "on", "tok_s": 50.0},
        {"case": "short turn", "context": 100, "mode": "on", "tok_s": 16.0, "ttft_s": 1.0, "read_tokens": 16},
        {"case": "short turn", "context": 100, "mode": "on", "tok_s": 1.0, "ttft_s": 64.0, "read_tokens": 64},
        {"case": "decode", "context": 100, "mode": "on", "tok_s": 63.0},
        {"case": "decode", "context": 100, "mode": "on", "tok_s": 1.0, "kv": "int8"},
        {"case": "decode", "context": 100, "mode": "off", "tok_s": 0.5},
    ]
    speeds = {row["mode"]: row["tok_s"] for row in answers(rows)}
    assert speeds == pytest.approx({"on": 64 / (1 + 1), "turn": 64 / (2 + 1), "off": 0.5})


def test_marks_are_at_the_positions_of_the_axes() -> None:
    lines = plot([Curve("on", [(1, 10), (2, 20), (3, 30)])], "turn", "seconds", 60)
    assert lines[0] == "seconds"
    marks = [(row, line.index("o")) for row, line in enumerate(lines[1:13]) if "o" in line]
    assert len(marks) == 3
    rows, columns = zip(*sorted(marks), strict=True)
    assert rows[1] - rows[0] == pytest.approx(rows[2] - rows[1], abs=1)
    assert columns[0] - columns[1] == pytest.approx(columns[1] - columns[2], abs=1)
    ticks = {line.split("┤")[0].strip() for line in lines if "┤" in line}
    assert {"0", "10", "20", "30"} <= ticks
    assert lines[-3].split() == ["1", "2", "3"]
    assert [lines[-2].strip(), lines[-1].strip()] == ["turn", "o on"]


def test_a_wide_range_gets_a_labelled_log_scale() -> None:
    curves = [Curve("on", [(256, 100), (1024, 100)]), Curve("off", [(256, 1), (1024, 0.01), (4096, 0.01)])]
    lines = plot(curves, "tokens", "tok/s", 80)
    assert (lines[0], lines[-2].strip()) == ("tok/s, log scale", "tokens, log scale")
    ticks = [line.split("┤")[0].strip() for line in lines if "┤" in line]
    assert ticks == ["100", "10", "1", "0.1", "0.01"]
    first, middle = (next(line for line in lines if line.strip().startswith(f"{n} ┤")) for n in ("100", "1"))
    assert first.count("o") == 2
    assert middle.index("+") == first.index("o")
    assert lines[-3].split() == ["256", "1,024", "4,096"]


def test_overlapping_marks_have_a_legend_and_one_point_has_no_plot() -> None:
    same = [(1.0, 5.0), (2.0, 5.0)]
    lines = plot([Curve("on", same), Curve("off", same)], "turn", "s", 70)
    assert sum(line.count("*") for line in lines[:-1]) == 2
    assert lines[-1].strip() == "o on   + off   * several"
    assert plot([Curve("on", [(1, 5)]), Curve("off", [])], "turn", "s", 70) == []


@pytest.mark.parametrize("low", [0.002, 0.9, 3.0, 7.5, 123.0, 45678.0])
@pytest.mark.parametrize("factor", [1.0, 1.5, 7.9, 8.1, 40.0, 1e6])
def test_every_axis_has_ticks_within_its_range(low: float, factor: float) -> None:
    lines = plot([Curve("on", [(1, low), (2, low * factor)])], "turn", "s", 70)
    ticks = [float(line.split("┤")[0].replace(",", "")) for line in lines if "┤" in line]
    assert len(ticks) > 1
    assert all(tick <= low * factor * 1.06 for tick in ticks)


def test_ratios_compare_equal_cases(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    rows = [
        {"case": "decode", "context": 256, "mode": "on", "tok_s": 50.0},
        {"case": "turn", "turn": 2, "context": 90, "mode": "on", "tok_s": 40.0, "ttft_s": 0.2},
        {"case": "short turn", "context": 256, "mode": "on", "tok_s": 16.0, "read_tokens": 16},
        {"case": "short turn", "context": 256, "mode": "on", "tok_s": 10.0, "read_tokens": 64},
    ]
    file.write_text(json.dumps({"engine": "other", "rows": rows}))
    ours = [
        {"case": "decode", "context": 256, "mode": "on", "tok_s": 100.0},
        {"case": "decode", "context": 256, "mode": "on", "tok_s": 1.0, "kv": "int8"},
        {"case": "decode", "context": 256, "mode": "off", "tok_s": 1.0},
        {"case": "decode", "context": 256, "mode": "on", "tok_s": 1.0, "weights": "int8"},
        {"case": "turn", "turn": 2, "context": 80, "mode": "on", "tok_s": 60.0, "ttft_s": 0.05},
        {"case": "short turn", "context": 256, "mode": "on", "tok_s": 30.0, "read_tokens": 64},
    ]
    shown = _printed(ratios(ours, *read_peers(file)))
    assert [word for word in shown.split() if word in {"2.00", "1.50", "4.00", "3.00"}] == [
        "2.00",
        "1.50",
        "4.00",
        "3.00",
    ]
    assert "0.02" not in shown


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"context": 1}]}', "{}"])
def test_a_peers_file_without_rows_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(KvchatError, match=r"other\.json has no rows"):
        read_peers(file)


def test_draw_writes_an_svg_file(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "curves.svg"
    refuse_plot(file)
    draw(measured["rows"], file)
    assert "<svg" in file.read_text(encoding="utf-8")


def test_an_unknown_plot_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KvchatError, match=r"neither \.svg nor \.png"):
        refuse_plot(tmp_path / "curves.gif")


def test_the_trace_contains_the_turn(tiny: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    profile_turn(tiny, file)
    names = {event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]}
    assert any(name.startswith("aten::") for name in names)


def test_a_context_beyond_the_models_limit_is_an_error(tiny: LoadedModel) -> None:
    with pytest.raises(KvchatError, match="needs 160 more"):
        run_bench(tiny, BenchOptions([10**6], 1, 2), Runner(lambda _words: None))
