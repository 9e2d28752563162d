"""Curves in a terminal: quadrant blocks (two by two points per character), in colours if several.

Where a terminal has no colours, several curves have one plain mark each; where it has no Unicode,
all have. plotext draws more, but from one figure that the whole process shares, and its interface
changed with 6.0 after two years without a release; this is a page, and any part can call it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

Series = Sequence[tuple[float, float]]
"""Points (x, y), x ascending."""

SPLITS = ("validation", "test")
"""What is evaluated."""

LABEL = 10  # characters of a y label, as long as -1.234e+56
MARKS = "*o+x#@%&"
# Character of a cell by its four points: 1 upper left, 2 upper right, 4 lower left, 8 lower right.
QUADRANTS = (
    " \u2598\u259d\u2580\u2596\u258c\u259e\u259b\u2597\u259a\u2590\u259c\u2584\u2599\u259f\u2588"
)
COLOURS = (36, 33, 35, 32, 31, 34)  # cyan, yellow, magenta, green, red, blue; legible on both pages

Cells = set[tuple[int, int]]
"""Cells (column, row), row 0 on top."""


def series(records: Iterable[Mapping[str, Any]], metric: str = "loss") -> list[tuple[float, float]]:
    """(iteration, metric) of every step that did work and has the metric as a finite number."""
    values = ((r["iteration"], r.get(metric)) for r in records if r["event"] == "step")
    return [(x, y) for x, y in values if _is_number(y)]


def evaluations(
    records: Iterable[Mapping[str, Any]], split: str = "validation", key: str = "loss"
) -> list[tuple[float, float]]:
    """(iteration, loss) of every evaluation of a split."""
    chosen = [r for r in records if r["event"] == "eval" and r.get("split") == split]
    return [(r["iteration"], r[key]) for r in chosen if _is_number(r.get(key))]


def metrics_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that `series` knows of these records, in their order; counters left out."""
    steps = [record for record in records if record["event"] == "step"]
    keys = {key: True for step in steps for key, value in step.items() if _is_number(value)}
    return [key for key in keys if key not in ("iteration", "train_iters", "time")]


def plot(
    curves: Mapping[str, Series],
    title: str,
    x_label: str = "iteration",
    width: int = 80,
    height: int = 16,
    encoding: str = "utf-8",
    *,
    points: Mapping[str, Series] | None = None,
    colour: bool = False,
) -> str:
    """Draws curves in one frame.

    Args:
        curves: name -> points; names are shown where there are several.
        title: first line; it says which mark is validation, where there is any.
        x_label: what x is.
        width: total number of columns, at least 30.
        height: rows of the drawing, at least 2.
        encoding: of the output stream; decides whether blocks can be used.
        points: name of a curve -> its validation, drawn as marks over it; of several curves only
            where colours tell whose they are.
        colour: whether the terminal shows ANSI colours.

    Returns:
        Lines of at most `width` columns, each with a newline; one line if there is nothing to plot.

    Raises:
        ValueError: the frame is too small.
    """
    if width < 30 or height < 2:
        raise ValueError(
            f"a plot of {width} x {height} is too small: at least 30 columns and 2 rows are needed"
        )
    blocks = _encodable(QUADRANTS, encoding) and (colour or len(curves) == 1)
    named = points if points and (blocks or len(curves) == 1) else {}
    shown = {name: named[name] for name in curves if named.get(name)}
    every = [point for curve in (*curves.values(), *shown.values()) for point in curve]
    if not every:
        return f"{title}: nothing to plot\n"
    columns = width - LABEL - 2
    limits = [_limits(values) for values in zip(*every, strict=True)]
    canvas = _Canvas(columns, height, colour)
    for number, curve in enumerate(curves.values()):
        if blocks:
            canvas.blocks(_cells(curve, limits, 2 * columns, 2 * height), number)
        else:
            canvas.marks(_cells(curve, limits, columns, height), MARKS[number % len(MARKS)], number)
    for number, name in enumerate(curves):
        cells = _cells(shown.get(name, []), limits, columns, height, joined=False)
        canvas.marks(cells, MARKS[1], number if len(curves) > 1 else 1)
    validation = f"; {MARKS[1]} validation" if shown else ""
    (low_x, high_x), (low_y, high_y) = limits
    labels = {
        round((high_y - y) / (high_y - low_y) * (height - 1)): f"{y:.10g}"
        for y in ticks(low_y, high_y, max(3, height // 3))
    }
    lines = [
        f"{title}{validation}".center(width).rstrip()[:width],
        *(f"{labels.get(n, ''):>{LABEL}} |{row}" for n, row in enumerate(canvas.rows())),
        *_axis((low_x, high_x), x_label, columns),
    ]
    if len(curves) > 1:
        signs = ["\u2588" if blocks else MARKS[n % len(MARKS)] for n in range(len(curves))]
        lines += [f"{canvas.sign(n, sign)} {name[: width - 2]}"
                  for n, (sign, name) in enumerate(zip(signs, curves, strict=True))]  # fmt: skip
    return "\n".join(lines) + "\n"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most `most` and at least one; 1, 2 or 5 x 10^n apart."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / most)) if span / most > sys.float_info.min else 0
    for factor in (1, 2, 5, 10, 20):
        apart = step * factor
        if not apart or not math.isfinite(apart):
            break
        first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
        if 0 < last - first + 1 <= most:
            return [float(f"{n * apart:.10g}") for n in range(first, last + 1)]
    return [low, high]


def _axis(limits: tuple[float, float], label: str, columns: int) -> list[str]:
    """The x axis, its ticks' labels, and what x is."""
    low, high = limits
    line, text = ["-"] * columns, [" "] * columns
    end = -2
    for x in ticks(low, high, max(2, columns // 12)):
        place, word = round((x - low) / (high - low) * (columns - 1)), f"{x:.10g}"
        start = min(max(0, place - len(word) // 2), columns - len(word))
        if start > end + 1:
            text[start : start + len(word)] = word
            line[place], end = "+", start + len(word)
    first = label if len(label) <= LABEL else ""
    lines = [f"{'':>{LABEL}} +{''.join(line)}", f"{first:>{LABEL}}  {''.join(text)}".rstrip()]
    return (
        lines if first else [*lines, f"{'':>{LABEL}}  {label[:columns].center(columns)}".rstrip()]
    )


class _Canvas:
    """Characters, each with the number of its curve; later ones lie over earlier ones."""

    def __init__(self, columns: int, height: int, colour: bool) -> None:
        self._colour = colour
        self._rows: list[list[tuple[str, int]]] = [[(" ", -1)] * columns for _ in range(height)]

    def blocks(self, cells: Cells, number: int) -> None:
        """Cells of half a column and half a row."""
        quadrants: dict[tuple[int, int], int] = {}
        for column, row in cells:
            place = (row // 2, column // 2)
            quadrants[place] = quadrants.get(place, 0) | 1 << (column % 2 + 2 * (row % 2))
        for (row, column), bits in quadrants.items():
            self._rows[row][column] = (QUADRANTS[bits], number)

    def marks(self, cells: Cells, mark: str, number: int) -> None:
        """Cells of a character."""
        for column, row in cells:
            self._rows[row][column] = (mark, number)

    def sign(self, number: int, text: str) -> str:
        """A text in the colour of a curve."""
        if not self._colour or number < 0:
            return text
        return f"\x1b[{COLOURS[number % len(COLOURS)]}m{text}\x1b[0m"

    def rows(self) -> list[str]:
        """The rows, without blanks at their ends."""
        lines = []
        for row in self._rows:
            runs: list[tuple[str, int]] = []
            for text, number in row:
                if runs and runs[-1][1] == number:
                    runs[-1] = (runs[-1][0] + text, number)
                else:
                    runs.append((text, number))
            if runs and runs[-1][1] < 0:
                runs.pop()
            lines.append("".join(self.sign(number, text) for text, number in runs))
        return lines


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, kept apart where all are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _cells(
    curve: Series,
    limits: Sequence[tuple[float, float]],
    across: int,
    down: int,
    *,
    joined: bool = True,
) -> Cells:
    """Cells of the points, and those on the straight lines between them where they are joined."""
    (low_x, high_x), (low_y, high_y) = limits
    xs = [(x - low_x) / (high_x - low_x) * (across - 1) for x, _ in curve]
    ys = [(high_y - y) / (high_y - low_y) * (down - 1) for _, y in curve]
    scaled = list(zip(xs, ys, strict=True))
    cells = set()
    for (column, row), (to_column, to_row) in zip(scaled[:1] + scaled, scaled, strict=False):
        far = max(abs(to_column - column), abs(to_row - row)) if joined else 0
        steps = max(1, math.ceil(far))
        for part in (step / steps for step in range(0 if joined else 1, steps + 1)):
            cells.add(
                (round(column + (to_column - column) * part), round(row + (to_row - row) * part))
            )
    return cells


def _encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
