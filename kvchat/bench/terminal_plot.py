"""Plots curves as text, with labelled axes and without colours. Must not depend on what is plotted."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

MARKS = "o+x#%@"
SEVERAL = "*"
"""Marks of several curves in one cell."""
BETWEEN = "·"
WIDEST, HEIGHT = 100, 12
WIDE_RANGE = 8
"""A larger ratio of highest to lowest value gets a logarithmic scale."""
HEADROOM = 1.05


@dataclass(frozen=True, slots=True)
class Curve:
    """Named points with positive coordinates."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to the cells of an axis."""

    low: float
    high: float
    cells: int
    logarithmic: bool

    def cell(self, value: float) -> int:
        """The cell of a value: 0 for `low`, `cells` - 1 for `high`."""
        low, high, at = (self._along(each) for each in (self.low, self.high, value))
        return round((at - low) / (high - low) * (self.cells - 1)) if high > low else 0

    def _along(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value

    @property
    def named(self) -> str:
        """Suffix of the axis label."""
        return ", log scale" if self.logarithmic else ""


def plot(curves: Sequence[Curve], x: str, y: str, width: int) -> list[str]:
    """Lines of text at most `width` cells wide; empty if no curve has two points.

    A linear y axis starts at zero; logarithmic axes are labelled.
    """
    drawn = [curve for curve in curves if curve.points]
    if not any(len(curve.points) > 1 for curve in drawn):
        return []
    xs = sorted({point[0] for curve in drawn for point in curve.points})
    ys = [point[1] for curve in drawn for point in curve.points]
    heights = _heights(min(ys), max(ys))
    labels = {heights.cell(tick): f"{tick:,g}" for tick in _ticks(heights)}
    margin = max(map(len, labels.values()))
    far = xs[-1] / xs[0] > WIDE_RANGE
    across = Scale(xs[0], xs[-1], min(width, WIDEST) - margin - 3 - len(f"{xs[-1]:,g}") // 2, far)
    cells = _drawn(drawn, across, heights)
    lines = [f"{y}{heights.named}"]
    for row in reversed(range(HEIGHT)):
        axis = "┤" if row in labels else "│"
        marks = "".join(cells.get((column, row), " ") for column in range(across.cells))
        lines.append(f"{labels.get(row, ''):>{margin}} {axis}{marks}".rstrip())
    columns, numbers = _under(xs, across)
    lines.append(f"{'':>{margin}} └{''.join('┬' if c in columns else '─' for c in range(across.cells))}")
    lines.append(f"{'':>{margin}}  {numbers}".rstrip())
    names = [f"{mark} {curve.name}" for mark, curve in zip(MARKS, drawn, strict=False)]
    names += [f"{SEVERAL} several"] if SEVERAL in cells.values() else []
    return [*lines, f"{'':>{margin}}  {x}{across.named}", f"{'':>{margin}}  {'   '.join(names)}"]


def _heights(low: float, high: float) -> Scale:
    if high / low < WIDE_RANGE:
        return Scale(0, high * HEADROOM, HEIGHT, logarithmic=False)
    return Scale(low / HEADROOM, high * HEADROOM, HEIGHT, logarithmic=True)


def _ticks(scale: Scale) -> list[float]:
    """At least two round values within the scale: 1, 2 and 5 times powers of ten."""
    tens = range(math.floor(math.log10(scale.low or scale.high / 100)), math.ceil(math.log10(scale.high)) + 1)
    if not scale.logarithmic:
        step = next(s for ten in tens for d in (1, 2, 5) if scale.high / (s := d * 10.0**ten) <= 5)
        return [round(step * n, 10) for n in range(int(scale.high / step) + 1)]
    for digits in ((1,), (1, 2, 5)):
        ticks = [round(d * 10.0**ten, 10) for ten in tens for d in digits]
        inside = [tick for tick in ticks if scale.low <= tick <= scale.high]
        if len(inside) > 1:
            break
    return inside


def _drawn(curves: Iterable[Curve], across: Scale, heights: Scale) -> dict[tuple[int, int], str]:
    """(column, row) → character; marks replace the dots of connecting lines."""
    between: dict[tuple[int, int], str] = {}
    marked: dict[tuple[int, int], str] = {}
    for mark, curve in zip(MARKS, curves, strict=False):
        places = [(across.cell(x), heights.cell(y)) for x, y in sorted(curve.points)]
        for (left, from_), (right, to) in pairwise(places):
            for column in range(left + 1, right):
                share = (column - left) / (right - left)
                between[column, round(from_ + share * (to - from_))] = BETWEEN
        for place in dict.fromkeys(places):
            marked[place] = SEVERAL if place in marked else mark
    return between | marked


def _under(xs: Sequence[float], across: Scale) -> tuple[set[int], str]:
    """(columns with a tick, the line of labels): first and last value, and those that fit between."""
    columns: set[int] = set()
    line, last = "", f"{xs[-1]:,g}"
    ends = across.cell(xs[-1]) - len(last) // 2
    for x in xs:
        text, column = f"{x:,g}", across.cell(x)
        start = max(0, column - len(text) // 2)
        if x == xs[-1] or ((not line or start > len(line)) and start + len(text) < ends):
            line, columns = f"{line:<{start}}{text}", columns | {column}
    return columns, line
