"""What `bench` measures has the agreed shape, and what is made of it says the same."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from kvchat.bench import Measured, profile_turn, run_bench
from kvchat.bench_report import draw, ratios, read_peers, refuse_plot, report
from kvchat.engine.load import LoadedModel
from kvchat.errors import KvchatError


@pytest.fixture(scope="module")
def measured(tiny: LoadedModel) -> Measured:
    return run_bench(
        tiny,
        [48],
        turns=2,
        answer_tokens=4,
        fill=True,
        precisions=["int8"],
        note=lambda _words: None,
    )


def _printed(renderable: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_every_case_is_there_with_its_figures(measured: Measured) -> None:
    rows = measured["rows"]
    cases = {(row["case"], row["mode"], row.get("kv")) for row in rows}
    assert {
        ("prefill", "on", None),
        ("decode", "on", None),
        ("decode", "on", "int8"),
        ("decode", "off", None),
        ("draft, copies", "off", None),
        ("draft, copies", "lookup", None),
        ("restore", "restored", None),
        ("turn", "on", None),
        ("turn", "turn", None),
        ("turn", "off", None),
    } <= cases
    assert all(float(str(row["tok_s"])) > 0 for row in rows)
    assert measured["rss_bytes"] > 0
    assert json.loads(json.dumps(measured))["rows"] == rows


def test_a_later_turn_reads_its_new_tokens_only_where_the_cache_is_on(measured: Measured) -> None:
    read = {
        row["mode"]: int(str(row["read_tokens"]))
        for row in measured["rows"]
        if row["case"] == "turn" and row["turn"] == 2
    }
    assert read["on"] < read["turn"] == read["off"]


def test_the_report_shows_every_row(measured: Measured) -> None:
    shown = _printed(report(measured["rows"]))
    assert shown.count("decode at 48") == 3
    assert "int8" in shown
    assert "restored" in shown


def test_ratios_are_ours_over_theirs(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    rows = [
        {"case": "decode", "context": 256, "mode": "on", "tok_s": 50.0},
        {"case": "turn", "turn": 2, "context": 90, "mode": "on", "tok_s": 40.0, "ttft_s": 0.2},
    ]
    file.write_text(json.dumps({"engine": "other", "rows": rows}))
    ours = [
        {"case": "decode", "context": 256, "mode": "on", "tok_s": 100.0},
        {"case": "decode", "context": 256, "mode": "on", "tok_s": 1.0, "kv": "int8"},
        {"case": "decode", "context": 256, "mode": "off", "tok_s": 1.0},
        {"case": "turn", "turn": 2, "context": 80, "mode": "on", "tok_s": 60.0, "ttft_s": 0.05},
    ]
    shown = _printed(ratios(ours, *read_peers(file)))
    assert [word for word in shown.split() if word in {"2.00", "1.50", "4.00"}] == ["2.00", "1.50", "4.00"]
    assert "0.02" not in shown


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"context": 1}]}', "{}"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(KvchatError, match=r"other\.json has no rows"):
        read_peers(file)


def test_curves_are_drawn(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "curves.svg"
    refuse_plot(file)
    draw(measured["rows"], file)
    assert "<svg" in file.read_text(encoding="utf-8")


def test_another_kind_of_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvchatError, match=r"neither \.svg nor \.png"):
        refuse_plot(tmp_path / "curves.gif")


def test_a_trace_holds_the_turn(tiny: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    profile_turn(tiny, file)
    names = {event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]}
    assert any(name.startswith("aten::") for name in names)


def test_a_context_beyond_the_model_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(KvchatError, match="holds"):
        run_bench(
            tiny, [10**6], turns=1, answer_tokens=2, fill=False, precisions=[], note=lambda _words: None
        )
