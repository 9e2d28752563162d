"""Meter: turns the steps since the last log line into a record of metrics.jsonl.

Rates count only the steps that did work and their time, not evaluation, saving and skipped steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, SupportsFloat

from megatron.checkpoint.state import RunState
from megatron.config.schema import RunConfig
from megatron.training.device import Device
from megatron.training.metrics import METRICS, Interval
from megatron.training.metrics_file import MetricsRecord


class Meter:
    """Collects steps; `record` closes the interval and starts the next.

    `last` has loss and gradient norm of each step of the last record, None for a skipped one.

    Losses and gradient norms may be device tensors: only `record` fetches them, so that no step
    waits for the device. They must not be written to afterwards.

    Args:
        run: the configuration.
        device: waited for before every reading of the clock that ends an interval or a pause.
        measured: gives what only the engine knows, such as the pipeline's bubble; `record` calls
            it on all ranks, so it may be a collective.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch, for the records' `time`.
    """

    def __init__(
        self,
        run: RunConfig,
        device: Device,
        measured: Callable[[], Mapping[str, Any]] = dict,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._run = run
        self._device = device
        self._measured = measured
        self._clock = clock
        self._wall_clock = wall_clock
        self.last: list[tuple[float, float | None] | None] = []
        self.start()

    def start(self) -> None:
        """Resets and starts the clock: call it right before the first step."""
        self._steps: list[tuple[SupportsFloat, SupportsFloat | None] | None] = []
        self._loss_scale: float | None = None
        self._skipped = 0
        self._paused = 0.0
        self._since = self._clock()

    def step(
        self,
        loss: SupportsFloat,
        grad_norm: SupportsFloat | None,
        loss_scale: float | None = 1.0,
    ) -> None:
        """One step that did work.

        Args:
            loss: mean loss of the global batch, nats per token.
            grad_norm: norm before clipping; None where the engine has none.
            loss_scale: fp16's scale, 1 elsewhere.
        """
        self._steps.append((loss, grad_norm))
        self._loss_scale = loss_scale

    def refused(self, count: int) -> None:
        """Steps that did work but changed no weight: skipped in the counter, work in the rates."""
        self._skipped += count

    def skip(self) -> None:
        """One step that was skipped; its time belongs inside `off_the_clock`."""
        self._skipped += 1
        self._steps.append(None)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Leaves the time inside out of the steps; work queued before is waited for and counts."""
        self._device.synchronize()
        start = self._clock()
        try:
            yield
        finally:
            self._device.synchronize()
            self._paused += self._clock() - start

    def record(
        self, state: RunState, learning_rate: float, corpus_loss: Mapping[str, float] | None = None
    ) -> MetricsRecord:
        """The record of the interval that ends with `state`, and the start of the next interval.

        Returns:
            METRICS by key: event "step", or "skip" where no step since the last record did work.
            `loss` is the mean over the steps that did, not finite where one was not; `grad_norm`
            and `loss_scale` are the last step's; `elapsed_s` is seconds per step;
            `skipped_iterations` and `nan_iterations` count since the last record.
        """
        self._device.synchronize()
        self.last = [None if step is None else _fetched(*step) for step in self._steps]
        interval = Interval(
            run=self._run,
            device=self._device,
            state=state,
            seconds=self._clock() - self._since - self._paused,
            ended=self._wall_clock(),
            learning_rate=learning_rate,
            steps=self.last,
            loss_scale=self._loss_scale,
            skipped=self._skipped,
            measured=self._measured(),
            corpus_loss=corpus_loss,
        )
        self.start()
        known = [metric for metric in METRICS if metric.always or interval.losses]
        values = [(metric, metric.value(interval)) for metric in known]
        return {m.key: value for m, value in values if value is not None or not m.optional}


def _fetched(loss: SupportsFloat, norm: SupportsFloat | None) -> tuple[float, float | None]:
    return float(loss), None if norm is None else float(norm)
