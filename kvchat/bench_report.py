"""Shows what `bench` measured: a table, bars, ratios to another engine's figures, and curves in a file.

It knows rows as plain values; it measures nothing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table

from kvchat.errors import KvchatError
from kvchat.text import megabytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, object]

BAR_CELLS = 32
FORMATS = (".svg", ".png")


def report(rows: Sequence[Row]) -> RenderableType:
    """The rows for people: a table, and bars of how fast tokens are generated."""
    return Group(table_of(rows), "", bars_of(rows))


def table_of(rows: Iterable[Row]) -> Table:
    """Every row."""
    table = Table("case", "cache", "turn", "context", "read", "TTFT", "restore", "tok/s", "KV")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            str(row["case"]),
            _mode(row),
            _cell(row.get("turn"), "{}"),
            _cell(row["context"], "{:,}"),
            _cell(row.get("read_tokens"), "{:,}"),
            _cell(row.get("ttft_s"), "{:.3f} s"),
            _cell(row.get("restore_s"), "{:.3f} s"),
            _cell(row["tok_s"], "{:,.1f}"),
            megabytes(int(str(row["kv_bytes"]))) if row.get("kv_bytes") else "",
        )
    return table


def _mode(row: Row) -> str:
    return f"{row['mode']}, {row['kv']}" if row.get("kv") else str(row["mode"])


def bars_of(rows: Iterable[Row]) -> Table:
    """Tokens a second of every decode row, side by side."""
    decode = [row for row in rows if row["case"] in ("decode", "draft")]
    most = max((_number(row["tok_s"]) for row in decode), default=0.0)
    table = Table.grid(padding=(0, 1))
    for row in decode:
        speed = _number(row["tok_s"])
        label = f"{row['case']} at {_number(row['context']):,.0f}, {_mode(row)}"
        table.add_row(label, Bar(most, 0, speed, width=BAR_CELLS), f"{speed:,.1f} tok/s")
    return table


def _cell(value: object, form: str) -> str:
    return "" if value is None else form.format(value)


def _number(value: object) -> float:
    return float(str(value))


# ---- beside another engine --------------------------------------------------------------------------------


def read_peers(file: Path) -> tuple[str, list[Row]]:
    """(name of the engine, its rows) from a file of the shape that `bench --json` prints.

    Raises:
        KvchatError: it is no such file.
    """
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
        rows: list[Row] = [{**row, "case": row["case"], "mode": row["mode"]} for row in measured["rows"]]
        return str(measured.get("engine", file.stem)), rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KvchatError(f"{file} has no rows of a bench: {error}") from error


def ratios(rows: Iterable[Row], name: str, peers: Sequence[Row]) -> Table:
    """How many times faster than the other engine, for every case that both measured with the cache on."""
    table = Table("case", "context", "tok/s", name, "ratio", title=f"beside {name}")
    for column in table.columns[1:]:
        column.justify = "right"
    others = {(row["case"], row.get("turn") or row["context"]): row for row in peers if row["mode"] == "on"}
    for row in rows:
        other = others.get((row["case"], row.get("turn") or row["context"]))
        if other is None or row["mode"] != "on" or row.get("kv"):
            continue
        where = f"turn {row['turn']}" if row.get("turn") else f"{_number(row['context']):,.0f}"
        ours, theirs = _number(row["tok_s"]), _number(other["tok_s"])
        table.add_row(str(row["case"]), where, f"{ours:,.1f}", f"{theirs:,.1f}", f"{ours / theirs:.2f} ×")
        if row.get("ttft_s") and other.get("ttft_s"):
            ours, theirs = _number(row["ttft_s"]), _number(other["ttft_s"])
            table.add_row("TTFT", where, f"{ours:.3f} s", f"{theirs:.3f} s", f"{theirs / ours:.2f} ×")
    return table


# ---- as curves --------------------------------------------------------------------------------------------


def refuse_plot(file: Path) -> None:
    """Passes a file that `draw` can write: asked before a measurement that takes minutes.

    Raises:
        KvchatError: matplotlib is not there, or the file is of another kind.
    """
    if file.suffix.lower() not in FORMATS:
        raise KvchatError(f"{file} is neither .svg nor .png.")
    if find_spec("matplotlib") is None:
        raise KvchatError("Plots are drawn by matplotlib, which is not installed: pip install 'kvchat[plot]'")


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draws speed against context, TTFT over turns and bytes over tokens into an SVG or PNG file.

    Raises:
        KvchatError: the file can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    speed, turns, size = figure.subplots(1, 3)
    decode = [row for row in rows if row["case"] == "decode" and not row.get("kv")]
    speed.set_yscale("log")
    _curves(speed, decode, ("context", "tok_s"), ("tokens in the cache", "decode, tok/s"))
    chat = [row for row in rows if row["case"] == "turn"]
    _curves(turns, chat, ("turn", "ttft_s"), ("turn", "TTFT, s"))
    held = [row for row in chat if row["mode"] == "on" and row.get("kv_bytes")]
    held = [{**row, "megabytes": _number(row["kv_bytes"]) / 1e6} for row in held]
    _curves(size, held, ("context", "megabytes"), ("tokens of the conversation", "KV cache, MB"))
    try:
        figure.savefig(file)
    except OSError as error:
        raise KvchatError(f"{file} can't be written: {error.strerror or error}") from error


def _curves(axes: "Axes", rows: Sequence[Row], keys: tuple[str, str], labels: tuple[str, str]) -> None:
    """A curve for every cache mode."""
    for mode in dict.fromkeys(str(row["mode"]) for row in rows):
        points = [(_number(row[keys[0]]), _number(row[keys[1]])) for row in rows if row["mode"] == mode]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"cache {mode}")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    if rows:
        axes.legend()
