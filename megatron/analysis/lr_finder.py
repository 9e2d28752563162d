"""LR_FINDER=1: watches the loss while the rate rises, stops where it breaks away, and suggests.

The rate rises by one factor per step (config/pace.py). Nothing is saved: the weights are spoilt.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
from pathlib import Path
from typing import NamedTuple

from megatron.analysis.plot import plot
from megatron.checkpoint.atomic import write_atomically
from megatron.checkpoint.state import RunState
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.training.loggers import Tracker
from megatron.training.metrics_file import MetricsRecord
from megatron.training.stop import DIVERGED, StopRequest

log = logging.getLogger(__name__)

SMOOTHING = 0.9
"""Weight of the past in the moving average of the loss; its start is corrected as Adam's is."""

BREAKS_AWAY = 4.0
"""The search ends where the smoothed loss is above this multiple of its lowest value."""


class Point(NamedTuple):
    """One record of the search."""

    iteration: int
    rate: float
    loss: float
    smoothed: float


class LrFinder:
    """A tracker around the run's: every rank has one, sees the same losses and stops alike.

    Args:
        tracker: receives every record.
        stop: is asked to stop the run.
    """

    def __init__(self, tracker: Tracker, stop: StopRequest) -> None:
        self._tracker, self._stop = tracker, stop
        self._average = 0.0
        self.points: list[Point] = []

    def log(self, record: MetricsRecord) -> None:
        """Adds the record of a step; asks to stop where the loss is not finite or far too high."""
        self._tracker.log(record)
        if record["event"] != "step":
            return
        loss = record["loss"]
        if not math.isfinite(loss):
            self._stop.ask(DIVERGED)
            return
        self._average = SMOOTHING * self._average + (1 - SMOOTHING) * loss
        smoothed = self._average / (1 - SMOOTHING ** (len(self.points) + 1))
        self.points.append(Point(record["iteration"], record["learning_rate"], loss, smoothed))
        if smoothed > BREAKS_AWAY * min(point.smoothed for point in self.points):
            self._stop.ask(DIVERGED)

    def close(self) -> None:
        """Closes the tracker."""
        self._tracker.close()

    def report(self, run: RunConfig) -> None:
        """Prints curve and suggestion and writes the points; for the rank that logs."""
        path = run.run_folder / "lr_finder.csv"
        try:
            _write(path, self.points)
        except OSError as error:
            log.warning(f"{path} cannot be written: {error}")
        curve = [(math.log10(point.rate), point.smoothed) for point in self.points]
        encoding = sys.stdout.encoding or "utf-8"
        print(plot({"loss": curve}, "smoothed loss", "log10 of LR", encoding=encoding))
        print(f"{suggestion_text(self.points)}\npoints        {path}")


def require_start(run: RunConfig, state: RunState) -> None:
    """Refuses a search in a run that has begun: its rates are for steps from 1 on.

    Raises:
        ConfigError: the state is not a run's start.
    """
    if run.optimizer.lr_finder and state.iteration > 0:
        raise ConfigError(
            f"LR_FINDER=1 searches from step 1, but {run.load_folder} holds step "
            f"{state.iteration}: unset RUN_NAME, RUN_DIR and LOAD, or set another RUN_NAME; with "
            "LOAD and FINETUNE=1 the search starts from those weights"
        )


def suggestions(points: list[Point]) -> tuple[float, float] | None:
    """(rate of the steepest descent, a tenth of the rate of the lowest loss); None without a fall.

    The descent is that of the smoothed loss over the logarithm of the rate.
    """
    lowest = min(range(len(points)), key=lambda n: points[n].smoothed, default=0)
    if lowest < 2:
        return None

    def slope(n: int) -> float:
        before, after = points[n - 1], points[n + 1]
        return (after.smoothed - before.smoothed) / math.log(after.rate / before.rate)

    steepest = min(range(1, lowest), key=slope)
    return points[steepest].rate, points[lowest].rate / 10


def suggestion_text(points: list[Point]) -> str:
    """What to try, as variables."""
    found = suggestions(points)
    if found is None:
        return "no suggestion: the loss never fell; lower MIN_LR, or raise TRAIN_ITERS"
    steepest, tenth = found
    return (
        f"suggested     LR={steepest:.2g} (the loss falls fastest there)\n"
        f"or            LR={tenth:.2g} (a tenth of the rate of the lowest loss)"
    )


def _write(path: Path, points: list[Point]) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("iteration", "learning_rate", "loss", "smoothed_loss"))
    rows.writerows(points)
    write_atomically(path, text.getvalue())
