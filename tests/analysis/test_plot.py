"""Curves in characters: where points land, and how wide it gets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.analysis import plot as module
from megatron.analysis.plot import plot, save_png, series
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


def test_axes_are_labelled() -> None:
    lines = plot({"run": [(1, 10.0), (200, 2.5)]}, "debug model: loss", height=5).splitlines()
    assert lines[0].strip() == "debug model: loss"
    assert lines[1].startswith("        10 |")
    assert lines[3].startswith("      6.25 |")
    assert lines[5].startswith("       2.5 |")
    assert set(lines[6].strip()) == {"+", "-"}
    assert lines[7].split() == ["1", "iteration", "200"]


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


def test_a_png_needs_matplotlib(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    written = save_png(path, {"run": [(0, 1.0), (1, 0.5)]}, "loss")
    assert written == path.exists()
    if written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(module.importlib, "import_module", absent)
    assert not save_png(tmp_path / "loss.png", {"run": [(0, 1.0)]}, "loss")
    assert not list(tmp_path.iterdir())
