"""Curves in a terminal, at most 80 columns wide, and as a PNG where matplotlib is installed.

One curve is drawn with quadrant blocks (two by two points per character); several, or a
terminal without Unicode, with one plain mark per curve.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Series = Sequence[tuple[float, float]]
"""Points (x, y), x ascending."""

LABEL = 10  # characters of a y label, as long as -1.234e+56
MARKS = "*o+x#@%&"
# Character of a cell by its four points: 1 upper left, 2 upper right, 4 lower left, 8 lower right.
QUADRANTS = (
    " \u2598\u259d\u2580\u2596\u258c\u259e\u259b\u2597\u259a\u2590\u259c\u2584\u2599\u259f\u2588"
)


def series(records: Iterable[Mapping[str, Any]], metric: str = "loss") -> list[tuple[float, float]]:
    """(iteration, metric) of every step that did work and has the metric as a finite number."""
    values = ((r["iteration"], r.get(metric)) for r in records if r["event"] == "step")
    return [(x, y) for x, y in values if y is not None and math.isfinite(y)]


def plot(
    curves: Mapping[str, Series],
    title: str,
    x_label: str = "iteration",
    width: int = 80,
    height: int = 16,
    encoding: str = "utf-8",
) -> str:
    """Draws curves in one frame.

    Args:
        curves: name -> points; names are shown where there are several.
        title: first line.
        x_label: what x is.
        width: total number of columns, at least 30.
        height: rows of the drawing, at least 2.
        encoding: of the output stream; decides whether blocks can be used.

    Returns:
        Lines of at most `width` columns, each with a newline; one line if there is nothing to plot.

    Raises:
        ValueError: the frame is too small.
    """
    if width < 30 or height < 2:
        raise ValueError(
            f"a plot of {width} x {height} is too small: at least 30 columns and 2 rows are needed"
        )
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return f"{title}: nothing to plot\n"
    columns = width - LABEL - 2
    limits = [_limits(values) for values in zip(*points, strict=True)]
    (low_x, high_x), (low_y, high_y) = limits
    if len(curves) == 1 and _encodable(QUADRANTS, encoding):
        (curve,) = curves.values()
        rows = _blocks(_cells(curve, limits, 2 * columns, 2 * height), columns, height)
    else:
        cells = [_cells(curve, limits, columns, height) for curve in curves.values()]
        rows = _marks(cells, columns, height)
    labels = {
        row: f"{high_y - (high_y - low_y) * row / (height - 1):.4g}"
        for row in (0, height // 2, height - 1)
    }
    left, right = f"{low_x:.10g}", f"{high_x:.10g}"
    lines = [
        title.center(width).rstrip()[:width],
        *(f"{labels.get(n, ''):>{LABEL}} |{row}"[:width].rstrip() for n, row in enumerate(rows)),
        f"{'':>{LABEL}} +{'-' * columns}",
        f"{'':>{LABEL}}  {left}{x_label.center(columns - len(left) - len(right))}{right}"[:width],
    ]
    if len(curves) > 1:
        lines += [f"{MARKS[i % len(MARKS)]} {name}"[:width] for i, name in enumerate(curves)]
    return "\n".join(lines) + "\n"


def save_png(path: Path, curves: Mapping[str, Series], title: str, y_label: str = "loss") -> bool:
    """Writes the same curves as a PNG; False where matplotlib is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    matplotlib.use("Agg")
    figure = figures.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot([x for x, _ in curve], [y for _, y in curve], label=name, linewidth=1)
    axes.set(title=title, xlabel="iteration", ylabel=y_label)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, kept apart where all are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _cells(
    curve: Series, limits: Sequence[tuple[float, float]], across: int, down: int
) -> set[tuple[int, int]]:
    """Cells (column, row), row 0 on top, on the straight lines from point to point."""
    (low_x, high_x), (low_y, high_y) = limits
    xs = [(x - low_x) / (high_x - low_x) * (across - 1) for x, _ in curve]
    ys = [(high_y - y) / (high_y - low_y) * (down - 1) for _, y in curve]
    scaled = list(zip(xs, ys, strict=True))
    cells = set()
    for (column, row), (to_column, to_row) in zip(scaled[:1] + scaled, scaled, strict=False):
        steps = max(1, math.ceil(max(abs(to_column - column), abs(to_row - row))))
        for part in (step / steps for step in range(steps + 1)):
            cells.add(
                (round(column + (to_column - column) * part), round(row + (to_row - row) * part))
            )
    return cells


def _blocks(cells: set[tuple[int, int]], columns: int, height: int) -> list[str]:
    def quadrant(column: int, row: int) -> str:
        corners = ((2 * column + bit % 2, 2 * row + bit // 2) for bit in range(4))
        return QUADRANTS[sum(1 << bit for bit, corner in enumerate(corners) if corner in cells)]

    return ["".join(quadrant(column, row) for column in range(columns)) for row in range(height)]


def _marks(curves: list[set[tuple[int, int]]], columns: int, height: int) -> list[str]:
    rows = [[" "] * columns for _ in range(height)]
    for number, cells in enumerate(curves):
        for column, row in cells:
            rows[row][column] = MARKS[number % len(MARKS)]
    return ["".join(row) for row in rows]


def _encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
