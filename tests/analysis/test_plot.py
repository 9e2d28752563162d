"""Curves in characters: where points land, and how wide it gets."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.analysis import plot as module
from megatron.analysis.plot import COLOURS, evaluations, metrics_of, plot, series, ticks
from tests.training import records_factory as make

VALUES = st.floats(-1e12, 1e12, allow_nan=False)
CURVE = st.lists(VALUES, max_size=30).map(lambda ys: [(float(x), y) for x, y in enumerate(ys)])


def drawing(text: str) -> list[str]:
    """The rows between the axes, label and border cut off, padded."""
    rows = [line.partition("|")[2] for line in text.splitlines() if "|" in line]
    width = max(map(len, rows))
    return [row.ljust(width) for row in rows]


def test_a_falling_line_is_a_diagonal() -> None:
    text = plot({"run": [(0, 1.0), (1, 0.0)]}, "loss", width=30, height=19, encoding="ascii")
    rows = drawing(text)
    columns = [row.index("*") for row in rows]
    assert columns == sorted(columns)
    assert columns[0] == 0
    assert columns[-1] == 30 - module.LABEL - 2 - 1
    assert all(row.count("*") == 1 for row in rows)


def test_blocks_double_the_resolution() -> None:
    """Two points a character in each direction: the first and the last are one quadrant each."""
    rows = drawing(plot({"run": [(0, 1.0), (1, 0.0)]}, "loss", width=30, height=19))
    assert rows[0][0] == "\u259a"  # upper left and lower right
    flat = drawing(plot({"run": [(0, 1.0), (1, 1.0), (2, 2.0)]}, "loss", width=30, height=4))
    assert flat[-1].startswith("\u2584" * 8)  # lower half


def test_axes_are_labelled_with_round_numbers_where_they_are() -> None:
    lines = plot({"run": [(0, 10.0), (200, 0.0)]}, "debug model: loss", height=11).splitlines()
    assert lines[0].strip() == "debug model: loss"
    labelled = [(n, line.partition("|")[0].strip()) for n, line in enumerate(lines[1:12])]
    assert [pair for pair in labelled if pair[1]] == [(0, "10"), (5, "5"), (10, "0")]
    axis, numbers = lines[12:]
    assert axis.index("+", module.LABEL + 2) == module.LABEL + 2  # 0 is the first column
    assert axis.rstrip()[-1] == "+" and len(axis) == 80  # and 200 the last
    assert numbers.split() == ["iteration", "0", "50", "100", "150", "200"]
    assert (
        plot({"run": [(0, 1.0)]}, "loss", "log10 of LR").splitlines()[-1].strip() == "log10 of LR"
    )


@given(
    low=VALUES,
    span=st.floats(1e-9, 1e12),
    most=st.integers(2, 12),
)
def test_ticks_are_round_few_and_inside(low: float, span: float, most: int) -> None:
    high = low + span
    if not high > low:
        return
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most
    slack = (high - low) * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert found == sorted(found)


def test_two_curves_keep_the_blocks_where_colours_tell_them_apart() -> None:
    curves = {"a": [(0, 1.0), (1, 0.0)], "b": [(0, 0.0), (1, 1.0)]}
    text = plot(curves, "loss", "", 30, 18, colour=True, points={"a": [(0.5, 0.5)]})
    first, second = (f"\x1b[{colour}m" for colour in COLOURS[:2])
    assert f"|{first}\u259a" in text and f"|{second}\u259e" in text  # two by two per character
    assert text.splitlines()[0].strip() == "loss; o validation"
    assert text.splitlines()[-2:] == [f"{first}\u2588\x1b[0m a", f"{second}\u2588\x1b[0m b"]
    assert f"{first}o\x1b[0m" in text  # in the colour of its curve
    plain = re.sub(r"\x1b\[\d+m", "", text)
    assert all(len(line) <= 30 for line in plain.splitlines())


def test_validation_lies_over_the_curve_at_its_steps() -> None:
    curve = [(float(x), 10.0 - x) for x in range(11)]
    for encoding, drawn in (("utf-8", "\u259a"), ("ascii", "*")):
        text = plot({"loss": curve}, "loss", width=32, height=11, encoding=encoding,
                    points={"loss": [(5, 5.0), (10, 0.0)]})  # fmt: skip
        rows = drawing(text)
        assert [(row.index("o"), n) for n, row in enumerate(rows) if "o" in row] == [
            (10, 5), (19, 10)
        ]  # fmt: skip
        assert text.splitlines()[0].strip() == "loss; o validation" and drawn in text


def test_several_runs_have_marks_and_a_legend() -> None:
    text = plot({"a": [(0, 1.0), (1, 0.0)], "b": [(0, 0.0), (1, 1.0)]}, "loss")
    assert text.splitlines()[-2:] == ["* a", "o b"]
    rows = drawing(text)
    assert rows[0][0] == "*"
    assert rows[-1][0] == "o"
    assert text.isascii()


@given(
    curves=st.dictionaries(st.text(st.characters(codec="ascii", exclude_categories=["C"])), CURVE),
    width=st.integers(30, 80),
    height=st.integers(2, 20),
)
def test_no_line_is_wider_than_asked(
    curves: dict[str, list[tuple[float, float]]], width: int, height: int
) -> None:
    text = plot(curves, "t" * 100, "x", width, height)
    assert text.endswith("\n")
    if any(curves.values()):
        assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("y", [0.0, 5.0, -1e-300])
def test_one_point_and_a_flat_curve_are_drawn(y: float) -> None:
    for curve in ([(3, y)], [(3, y), (9, y)]):
        rows = drawing(plot({"run": curve}, "loss", encoding="ascii"))
        assert sum(row.count("*") for row in rows) >= len(curve)


def test_nothing_to_plot_is_said() -> None:
    assert plot({"run": []}, "loss") == "loss: nothing to plot\n"


def test_too_small_a_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="20 x 16"):
        plot({"run": [(0, 1.0)]}, "loss", width=20)


def test_a_series_holds_finite_values_of_worked_steps() -> None:
    records = [make.step(1, 3.0), make.skip(2), make.step(3, math.nan), make.evaluation(3)]
    assert series(records) == [(1, 3.0)]
    assert series(records, "grad_norm") == [(1, 1.0), (3, 1.0)]
    assert series(records, "mfu") == []


def test_evaluations_are_of_one_split() -> None:
    records = [make.evaluation(3, 2.0), {**make.evaluation(3), "split": "test"}, make.step(4),
               make.evaluation(5, math.inf)]  # fmt: skip
    assert evaluations(records) == [(3, 2.0)]
    assert evaluations(records, "test") == [(3, 2.5)]


def test_metrics_are_named() -> None:
    names = metrics_of([make.step(1, corpus_loss={"code": 1.0}), make.evaluation(1)])
    assert {"loss", "grad_norm", "tokens_per_s"} <= set(names)
    assert not {"mfu", "event", "corpus_loss", "iteration", "perplexity"} & set(names)
