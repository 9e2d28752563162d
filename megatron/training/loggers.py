"""Where records go: console, metrics.jsonl, TensorBoard, W&B, behind one interface.

The loop holds one `Tracker`: `Trackers` on the rank that logs, `NullTracker` on the others. A
tracker that fails is reported once and left out from then on; training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron.config.schema import RunConfig
from megatron.training import console, dashboards
from megatron.training import metrics_file as records
from megatron.training.log import TRAINING_LOG
from megatron.training.progress import Progress

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives every record of a run, in order, then `close`, once."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes one record (records.py)."""

    def close(self) -> None:
        """Writes out what is pending."""


class NullTracker:
    """Ignores everything: for the ranks that do not log."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class ConsoleTracker:
    """Prints the line of each record, and now and then the time left."""

    def __init__(self, progress: Progress) -> None:
        self._log = logging.getLogger(TRAINING_LOG)
        self._progress = progress

    def log(self, record: Mapping[str, Any]) -> None:
        """Prints one or two lines."""
        self._log.info(console.line(record))
        if record["event"] in ("step", "skip"):
            rest = self._progress.line(record["iteration"], record["train_iters"])
            if rest is not None:
                self._log.info(rest)

    def close(self) -> None:
        """Nothing is pending."""


class JsonlTracker:
    """Appends each record to a file, line by line: a reader, or a crash, sees whole lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        self._file.write(f"{records.encode(record)}\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Trackers:
    """Several trackers as one; none of them can stop training."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands the record to each tracker."""
        for one in list(self._trackers):
            self._guard(one, partial(one.log, record), "is off from here on")

    def close(self) -> None:
        """Closes each tracker; a second call does nothing."""
        for one in list(self._trackers):
            self._guard(one, one.close, "was not closed cleanly")
        self._trackers = []

    def _guard(self, one: Tracker, call: Callable[[], None], consequence: str) -> None:
        try:
            call()
        # A library, a file system or a network may fail in any way; no record is worth a run.
        except Exception as error:
            self._trackers.remove(one)
            log.warning(f"{type(one).__name__} {consequence}: {type(error).__name__}: {error}")


def make_tracker(
    run: RunConfig, folder: Path, *, logs: bool, parameters: int, iteration: int
) -> Tracker:
    """The tracker of this rank.

    Args:
        run: configuration.
        folder: the run's folder; exists.
        logs: whether this rank is the one that logs.
        parameters: parameters of the model.
        iteration: steps done before; later ones in metrics.jsonl and TensorBoard, left by a crash,
            are dropped.
    """
    if not logs:
        return NullTracker()
    path = folder / "metrics.jsonl"
    dropped = records.truncate_after(path, iteration)
    if dropped:
        log.info(
            f"{path}: dropped {dropped} lines later than step {iteration}, which will be done again"
        )
    started: list[Tracker | None] = [
        ConsoleTracker(Progress()),
        JsonlTracker(path),
        dashboards.start_tensorboard(run.log, folder / "tensorboard", parameters, iteration),
        dashboards.start_wandb(run, folder, parameters),
    ]
    return Trackers([one for one in started if one is not None])
