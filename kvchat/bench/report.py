"""Reports of `bench`: a table, bars, curves, and ratios to another engine's results.

Works on rows as JSON objects. Must not measure or import the engine.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvchat.bench.terminal_plot import Curve, plot
from kvchat.errors import KvchatError, cause, reason
from kvchat.text import megabytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, object]
"""A `rows.Row` as `--json` prints it: without the fields that are None."""

BAR_CELLS = 24
ANSWER = 64
"""Length of the answer for the plot of speed against context."""
COLUMNS = ("case", "cache", "turn", "context", "read", "TTFT s", "disk s", "tok/s", "KV", "runs")
OPTIONAL = ("read", "disk s", "KV")
TABLE_CELLS, ROOMY_CELLS = 78, 100
"""Width of the whole table; a narrower terminal gets it without the optional columns."""
FORMATS = (".svg", ".png")


def report(rows: Sequence[Record], width: int) -> RenderableType:
    """The rows as text: a table, bars of the decode rates, and curves."""
    return Group(table_of(rows, width), "", bars_of(rows), *curves_of(rows, width))


def table_of(rows: Iterable[Record], width: int) -> Table:
    """A table of all rows; without the optional columns if `width` is too small."""
    columns = [name for name in COLUMNS if width >= TABLE_CELLS or name not in OPTIONAL]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.columns[0].no_wrap = True
    if width < ROOMY_CELLS:  # otherwise rich truncates the other columns
        table.columns[1].width = len("restored")
    for column in table.columns[2:]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows:
        cells = {
            "case": str(row["case"]),
            "cache": _mode(row),
            "turn": _cell(row.get("turn"), "{}"),
            "context": _cell(row["context"], "{:,}"),
            "read": _cell(row.get("read_tokens"), "{:,}"),
            "TTFT s": _cell(row.get("ttft_s"), "{:.3f}"),
            "disk s": _cell(row.get("restore_s"), "{:.3f}"),
            "tok/s": _speed(_number(row["tok_s"])),
            "KV": megabytes(int(str(row["kv_bytes"]))) if row.get("kv_bytes") else "",
            "runs": _cell(row.get("runs"), "{}"),
        }
        table.add_row(*(cells[name] for name in columns))
    return table


def _mode(row: Record) -> str:
    kv = f", KV {row['kv']}" if row.get("kv") else ""
    weights = f", weights {row['weights']}" if row.get("weights") else ""
    return f"{row['mode']}{kv}{weights}"


def bars_of(rows: Iterable[Record]) -> Table:
    """Bars of the rates of all decode and draft rows."""
    decode = [row for row in rows if row["case"] in ("decode", "draft")]
    most = max((_number(row["tok_s"]) for row in decode), default=0.0)
    table = Table.grid(padding=(0, 1))
    for row in decode:
        speed = _number(row["tok_s"])
        label = f"{row['case']} at {_number(row['context']):,.0f}, {_mode(row)}"
        table.add_row(label, Bar(most, 0, speed, width=BAR_CELLS), f"{_speed(speed)} tok/s")
    return table


def _cell(value: object, form: str) -> str:
    return "" if value is None else form.format(value)


def _speed(tok_s: float) -> str:
    """One decimal; below 1 tok/s two significant digits."""
    return f"{tok_s:,.1f}" if tok_s >= 1 else f"{tok_s:.2g}"


def _number(value: object) -> float:
    return float(str(value))


def curves_of(rows: Sequence[Record], width: int) -> list[Text]:
    """Speed against context and TTFT over turns, for every cache mode; no curve with one point."""
    speed = plot(
        _by_mode(answers(rows), ("context", "tok_s")),
        "tokens of the conversation",
        f"tok/s of an answer of {ANSWER} tokens with its TTFT",
        width,
    )
    chat = [row for row in rows if row["case"] == "turn"]
    ttft = plot(_by_mode(chat, ("turn", "ttft_s")), "turn of the chat", "TTFT in seconds", width)
    shown = [["", *lines] for lines in (speed, ttft) if lines]
    return [Text("\n".join(lines), no_wrap=True, overflow="crop") for lines in shown]


def answers(rows: Sequence[Record]) -> list[Record]:
    """Rate of an answer of `ANSWER` tokens to a short question, with its TTFT, for each context and mode."""
    own = [row for row in rows if _own(row)]
    steps = {(row["context"], row["mode"]): _number(row["tok_s"]) for row in own if row["case"] == "decode"}
    ttft: dict[tuple[object, object], float] = {
        (row["context"], "turn"): _number(row["context"]) / _number(row["tok_s"])
        for row in own
        if row["case"] == "prefill"
    }
    ttft |= {
        (row["context"], "on"): _number(row["ttft_s"]) for row in reversed(own) if row["case"] == "short turn"
    }
    # without a cache the first token costs as much as any other
    ttft |= {where: 1 / speed for where, speed in steps.items() if where[1] == "off"}
    return [
        {"context": context, "mode": mode, "tok_s": ANSWER / (first + (ANSWER - 1) / speed)}
        for (context, mode), first in ttft.items()
        if (speed := steps.get((context, "off" if mode == "off" else "on")))
    ]


def _by_mode(rows: Sequence[Record], keys: tuple[str, str]) -> list[Curve]:
    """A curve for each mode."""
    return [
        Curve(
            f"cache {mode}",
            [(_number(row[keys[0]]), _number(row[keys[1]])) for row in rows if row["mode"] == mode],
        )
        for mode in ("on", "turn", "off")
    ]


def _own(row: Record) -> bool:
    """Whether it was measured with the model's own precisions of KV cache and weights."""
    return not row.get("kv") and not row.get("weights")


# ---- beside another engine --------------------------------------------------------------------------------


def read_peers(file: Path) -> tuple[str, list[Record]]:
    """(name of the engine, its rows) from a file in the format of `bench --json`.

    Raises:
        KvchatError: the file can't be read or has another format.
    """
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
        rows: list[Record] = [{**row, "case": row["case"], "mode": row["mode"]} for row in measured["rows"]]
        return str(measured.get("engine", file.stem)), rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KvchatError(f"{file} has no rows of a bench: {reason(error)}") from error


def ratios(rows: Iterable[Record], name: str, peers: Sequence[Record]) -> Table:
    """Speed relative to the other engine, for every case that both measured with the cache on."""
    table = Table("case", "context", "tok/s", name, "ratio", title=f"compared with {name}")
    for column in table.columns[1:]:
        column.justify = "right"
    others = {_place(row): row for row in peers if row["mode"] == "on"}
    for row in rows:
        other = others.get(_place(row))
        if other is None or row["mode"] != "on" or not _own(row):
            continue
        where = f"turn {row['turn']}" if row.get("turn") else f"{_number(row['context']):,.0f}"
        where += f" + {row['read_tokens']}" if row["case"] == "short turn" else ""
        ours, theirs = _number(row["tok_s"]), _number(other["tok_s"])
        table.add_row(str(row["case"]), where, f"{ours:,.1f}", f"{theirs:,.1f}", f"{ours / theirs:.2f} ×")
        if row.get("ttft_s") and other.get("ttft_s"):
            ours, theirs = _number(row["ttft_s"]), _number(other["ttft_s"])
            table.add_row("TTFT", where, f"{ours:.3f} s", f"{theirs:.3f} s", f"{theirs / ours:.2f} ×")
    return table


def _place(row: Record) -> tuple[object, ...]:
    """Key of a row: rows with the same key are compared."""
    read = row.get("read_tokens") if row["case"] == "short turn" else None
    return row["case"], row.get("turn") or row["context"], read


# ---- as curves in a file ----------------------------------------------------------------------------------


def refuse_plot(file: Path) -> None:
    """Checks that `draw` can write a file, before a measurement that takes minutes.

    Raises:
        KvchatError: matplotlib is not installed, the format is unknown, or the folder is not writable.
    """
    if file.suffix.lower() not in FORMATS:
        raise KvchatError(f"{file} is neither .svg nor .png.")
    refuse_folder(file)
    if find_spec("matplotlib") is None:
        raise KvchatError("Plots are drawn by matplotlib, which is not installed: pip install 'kvchat[plot]'")


def refuse_folder(file: Path) -> None:
    """Checks that a file can be created in its folder.

    Raises:
        KvchatError: the folder is missing or not writable, or the path is a folder.
    """
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise KvchatError(f"{file} can't be written: {file.parent} is not a writable folder.")


def draw(rows: Sequence[Record], file: Path) -> None:
    """Plots speed against context, TTFT over turns and bytes over tokens into an SVG or PNG file.

    Raises:
        KvchatError: the file can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    speed, turns, size = figure.subplots(1, 3)
    decode = [row for row in rows if row["case"] == "decode" and _own(row)]
    speed.set_yscale("log")
    _curves(speed, decode, ("context", "tok_s"), ("tokens in the cache", "decode, tok/s"))
    chat = [row for row in rows if row["case"] == "turn"]
    _curves(turns, chat, ("turn", "ttft_s"), ("turn", "TTFT, s"))
    cached = [row for row in chat if row["mode"] == "on" and row.get("kv_bytes")]
    cached = [{**row, "megabytes": _number(row["kv_bytes"]) / 1e6} for row in cached]
    _curves(size, cached, ("context", "megabytes"), ("tokens of the conversation", "KV cache, MB"))
    try:
        figure.savefig(file)
    except OSError as error:
        raise KvchatError(f"{file} can't be written: {cause(error)}.") from error


def _curves(axes: "Axes", rows: Sequence[Record], keys: tuple[str, str], labels: tuple[str, str]) -> None:
    """Plots one curve for every cache mode."""
    for curve in _by_mode(rows, keys):
        if curve.points:
            axes.plot(*zip(*curve.points, strict=True), marker="o", label=curve.name)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    if rows:
        axes.legend()
