"""The search for a learning rate: when it stops, what it suggests, what it leaves behind."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.analysis.lr_finder import (
    SMOOTHING,
    LrFinder,
    Point,
    require_start,
    suggestions,
)
from megatron.checkpoint.state import RunState
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.parallel.control import ALONE
from megatron.training.resume import resume
from megatron.training.stop import DIVERGED, StopRequest
from megatron.training.trainer import Trainer
from tests.training.test_trainer import CPU, Adder, Numbers, Records, config


def search(folder: Path, losses: list[float]) -> tuple[LrFinder, Records, int]:
    """A run of as many steps as there are losses."""
    run = searching(folder, len(losses))
    engine, records, stop = Adder(), Records(), StopRequest()
    engine.losses = dict(enumerate(losses, 1))
    finder = LrFinder(records, stop)
    splits = SimpleNamespace(train=Numbers(), valid=None, test=None)
    data: Any = SimpleNamespace(splits=splits, corpus_losses=None, record=None)
    state = resume(run, engine, None, ALONE)
    outcome = Trainer(run, engine, data, CPU, finder, stop, state).train()
    assert outcome.error == ""
    assert not (folder / "checkpoints").exists(), "nothing that a later run would resume"
    finder.report(run)
    return finder, records, outcome.cause


def searching(folder: Path, steps: int) -> RunConfig:
    run = config(folder, steps, save=1)
    optimizer = dataclasses.replace(run.optimizer, lr_finder=True, learning_rate=1.0)
    return dataclasses.replace(run, optimizer=optimizer)


def test_it_stops_where_the_loss_breaks_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [8.0, 8.0, 7.0, 5.0, 3.0, 2.0, 2.0, 4.0, 400.0, 400.0, 400.0]
    finder, records, cause = search(tmp_path, losses)
    assert cause == DIVERGED and len(finder.points) == 9, "the tenth and eleventh are not taken"
    average = 0.0
    for number, (point, loss) in enumerate(zip(finder.points, losses, strict=False), 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        assert point.smoothed == pytest.approx(average / (1 - SMOOTHING**number))
        assert point.rate == pytest.approx(1e-6 * 1e6 ** ((number - 1) / 10))
    assert records.of("stop")[0]["reason"] == "the loss broke away (LR_FINDER)"
    rows = list(csv.DictReader((tmp_path / "lr_finder.csv").open()))
    assert [float(row["loss"]) for row in rows] == losses[:9]
    assert float(rows[3]["learning_rate"]) == finder.points[3].rate
    printed = capsys.readouterr().out
    assert "suggested     LR=" in printed and "log10 of LR" in printed


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path) -> None:
    finder, _, cause = search(tmp_path, [5.0, 4.0, 3.0, 2.0, math.nan, 1.0])
    assert cause == DIVERGED and [point.loss for point in finder.points] == [5.0, 4.0, 3.0, 2.0]


def test_a_search_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finder, _, cause = search(tmp_path, [5.0, 5.0, 5.0])
    assert cause == 0 and len(finder.points) == 3
    assert "no suggestion: the loss never fell" in capsys.readouterr().out


def test_the_rate_of_the_steepest_descent_is_suggested() -> None:
    rates = [10.0**-exponent for exponent in range(6, 0, -1)]
    smoothed = [9.0, 8.9, 8.0, 5.0, 4.0, 9.0]  # steepest around 1e-4 .. 1e-3, lowest at 1e-2
    points = [Point(n, r, s, s) for n, (r, s) in enumerate(zip(rates, smoothed, strict=True), 1)]
    steepest, tenth = suggestions(points) or (0.0, 0.0)
    assert steepest == pytest.approx(1e-3 if (8.9 - 5.0) < (8.0 - 4.0) else 1e-4)
    assert tenth == pytest.approx(1e-3)
    assert suggestions(points[:2]) is None and suggestions([]) is None


def test_a_run_that_has_begun_is_not_searched(tmp_path: Path) -> None:
    run = searching(tmp_path, 5)
    require_start(run, RunState())
    with pytest.raises(ConfigError, match="holds step 3"):
        require_start(run, RunState(iteration=3))
