"""Trackers of records: console, metrics.jsonl, TensorBoard, W&B, behind one interface.

The loop holds one `Tracker`, which does nothing on ranks that do not log. A tracker that fails is
reported once and tried again later; training continues.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.training import dashboards, events, metrics_file
from megatron.training.first_step import FirstStep
from megatron.training.log import TRAINING_LOG
from megatron.training.metrics_file import MetricsRecord
from megatron.training.phase_times import PhaseTimes

log = logging.getLogger(__name__)

RETRY_S = 60.0
"""A tracker that failed is left alone this long: each attempt may cost a network's timeout."""


class Tracker(Protocol):
    """Receives every record of a run, in order, then `close`, once."""

    def log(self, record: MetricsRecord) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Writes out what is pending."""


class Progress:
    """Estimates a run's remaining time from its steps' wall time, evaluation and saving included.

    The first step seen is the origin: start-up and compilation before it do not predict the rest.

    Args:
        every: minimum seconds between two lines.
        clock: seconds, monotonic.
    """

    def __init__(self, every: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._origin: tuple[int, float] | None = None
        self._last = 0.0

    def line(self, iteration: int, train_iters: int) -> str | None:
        """The line after step `iteration`; None where it is too early or no step is left."""
        now = self._clock()
        if self._origin is None:
            self._origin, self._last = (iteration, now), now
            return None
        first, start = self._origin
        if now - self._last < self._every or not first < iteration < train_iters:
            return None
        self._last = now
        steps = train_iters - iteration
        left = timedelta(seconds=round(steps * (now - start) / (iteration - first)))
        return f"progress={iteration / train_iters:.1%} | steps_left={steps} | time_left={left}"


class ConsoleTracker:
    """Prints the line of each record, and regularly the time left."""

    def __init__(self, progress: Progress) -> None:
        self._log = logging.getLogger(TRAINING_LOG)
        self._progress = progress

    def log(self, record: MetricsRecord) -> None:
        """Prints one or two lines."""
        self._log.info(events.line(record), extra={"made_from": record})
        if record["event"] in ("step", "skip"):
            rest = self._progress.line(record["iteration"], record["train_iters"])
            if rest is not None:
                self._log.info(rest, extra={"made_from": {"event": "progress"}})

    def close(self) -> None:
        """Nothing is pending."""


class JsonlTracker:
    """Appends each record to a file, line by line: a reader, or a crash, sees whole lines.

    What a full disk refuses is kept and written with the next record that it takes.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("ab", buffering=0)
        self._pending = b""
        self._refused = False

    def log(self, record: MetricsRecord) -> None:
        """Appends one line; a rollback first drops those of the steps that it undoes."""
        if record["event"] == "rollback":
            metrics_file.truncate_after(self._path, record["iteration"])
            self._file.close()
            self._file = self._path.open("ab", buffering=0)  # it may be another file by now
        self._pending += f"{metrics_file.encode(record)}\n".encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._refused:
                log.warning(f"{self._file.name}: {error}; its lines are kept and tried again")
            self._refused = True
            return
        if self._refused:
            log.info(f"{self._file.name} can be written again; no line is lost")
        self._refused = False

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        if self._pending:
            log.warning(f"{self._file.name} lacks {self._pending.count(10)} lines at its end")


class Trackers:
    """Several trackers as one; none of them can stop training. Without any it does nothing.

    One that fails is left alone for RETRY_S seconds, then tried again.
    """

    def __init__(
        self, trackers: Iterable[Tracker] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._trackers = list(trackers)
        self._clock = clock
        self._failed_at: dict[int, float] = {}  # by place in the list
        self._lost: dict[int, int] = {}

    def log(self, record: MetricsRecord) -> None:
        """Passes the record to each tracker."""
        for place, one in enumerate(self._trackers):
            if self._clock() < self._failed_at.get(place, -RETRY_S) + RETRY_S:
                self._lost[place] += 1
                continue
            try:
                one.log(record)
            # A library, a file system or a network may fail in any way; no record is worth a run.
            except Exception as error:
                if place not in self._failed_at:
                    log.warning(f"{_failure(one, error)}; tried again every {RETRY_S:.0f} s")
                self._failed_at[place] = self._clock()
                self._lost[place] = self._lost.get(place, 0) + 1
                continue
            if self._failed_at.pop(place, None) is not None:
                log.info(f"{type(one).__name__} works again; {self._lost.pop(place)} records lost")

    def close(self) -> None:
        """Closes each tracker; a second call does nothing."""
        for one in self._trackers:
            try:
                one.close()
            except Exception as error:  # as above
                log.warning(f"{_failure(one, error)}: it was not closed cleanly")
        self._trackers = []


class Behind:
    """Passes records on from a thread of its own: no step waits for a dashboard or a network.

    Args:
        tracker: must not fail, as `Trackers` does not; it is used by one thread at a time.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._records: queue.SimpleQueue[MetricsRecord | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._pass_on, name="trackers", daemon=True)
        self._thread.start()

    def log(self, record: MetricsRecord) -> None:
        """Returns at once."""
        self._records.put(record)

    def close(self) -> None:
        """Waits until all are passed on, and closes the tracker."""
        self._records.put(None)
        self._thread.join()
        self._tracker.close()

    def _pass_on(self) -> None:
        while (record := self._records.get()) is not None:
            self._tracker.log(record)


def _failure(one: Tracker, error: Exception) -> str:
    return f"{type(one).__name__} failed: {type(error).__name__}: {error}"


def start_jsonl(run: RunConfig, iteration: int) -> Tracker:
    """metrics.jsonl of the run, without the lines after step `iteration` that a crash left.

    Raises:
        ConfigError: it cannot be written.
    """
    path = run.run_folder / "metrics.jsonl"
    try:
        dropped = metrics_file.truncate_after(path, iteration)
        tracker = JsonlTracker(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; move it away or make room") from None
    if dropped:
        log.info(f"{path}: dropped {dropped} lines after step {iteration}, which will be repeated")
    return tracker


TRACKERS: dict[str, Callable[[RunConfig, int], Tracker | None]] = {
    "console": lambda run, iteration: ConsoleTracker(Progress()),
    "phases": lambda run, iteration: PhaseTimes() if run.log.timing_log_level else None,
    "first step": lambda run, iteration: FirstStep(run),
    "jsonl": start_jsonl,
    "tensorboard": dashboards.start_tensorboard,
    "wandb": dashboards.start_wandb,
}
"""Name -> starts a tracker of a run that has done so many steps; None where it is off."""

DASHBOARDS = ("tensorboard", "wandb")
"""Those that get their records behind the steps; what is promised of the others is on disk."""


def make_tracker(run: RunConfig, *, logs: bool, iteration: int) -> Tracker:
    """The tracker of this rank.

    Args:
        run: configuration; its folder exists.
        logs: whether this rank is the one that logs.
        iteration: steps done before; what an earlier start wrote about later ones is dropped.
    """
    if not logs:
        return Trackers()
    started = {name: start(run, iteration) for name, start in TRACKERS.items()}
    found = {name: tracker for name, tracker in started.items() if tracker is not None}
    trackers = [tracker for name, tracker in found.items() if name not in DASHBOARDS]
    shown = [tracker for name, tracker in found.items() if name in DASHBOARDS]
    return Trackers([*trackers, Behind(Trackers(shown))] if shown else trackers)
