"""Meter: what happened since the last log line, turned into one step record of metrics.jsonl.

Rates count only the steps that did work and only their time: evaluation, saving and skipped steps
are off the clock. Global rates are measured; every per-device figure is the global one divided by
the number of devices, here and once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsFloat

from megatron.checkpoint.state import RunState

Record = dict[str, Any]
MetricsRecord = Record
"""One line of metrics.jsonl, see records.py."""


@dataclass(frozen=True)
class Workload:
    """The constants of a run that turn seconds into rates.

    Attributes:
        train_iters: steps of the run.
        global_batch_size: samples of a step.
        seq_length: tokens of a sample.
        world_size: devices.
        data_parallel: replicas of the model.
        flops_per_token_lm: forward and backward FLOPs a token, full attention, no recompute
            (Megatron-LM).
        flops_per_token_ds: the same as DeepSpeed's formula counts it, recompute included.
        flops_per_token_causal: as `lm`, but half the attention, as a causal mask needs.
        peak_tflops: dense peak of one device in the run's precision; None: unknown, no MFU.
    """

    train_iters: int
    global_batch_size: int
    seq_length: int
    world_size: int
    data_parallel: int
    flops_per_token_lm: float
    flops_per_token_ds: float
    flops_per_token_causal: float
    peak_tflops: float | None = None

    def rates(self, seconds: float) -> Record:
        """Rates of a step that took `seconds`, global and per device (TFLOPS are per device)."""
        tokens = self.global_batch_size * self.seq_length / seconds
        tokens_per_gpu = tokens / self.world_size
        tflops_lm = tokens_per_gpu * self.flops_per_token_lm / 1e12
        return {
            "elapsed_s": seconds,
            "samples_per_s": self.global_batch_size / seconds,
            "tokens_per_s": tokens,
            "tokens_per_gpu_per_s": tokens_per_gpu,
            "tflops_lm": tflops_lm,
            "tflops_ds": tokens_per_gpu * self.flops_per_token_ds / 1e12,
            "tflops_causal": tokens_per_gpu * self.flops_per_token_causal / 1e12,
            "mfu": None if self.peak_tflops is None else tflops_lm / self.peak_tflops,
        }


class Meter:
    """Collects steps; `record` closes the interval and starts the next.

    Losses and gradient norms may be device tensors: they are kept as they are and fetched by
    `record` only, so that no step waits for the device. Nobody may write to them afterwards.

    Args:
        workload: the run's constants.
        memory_max_gib: peak memory of this process' device, GiB.
        synchronize: waits for the device; called before every reading of the clock that ends an
            interval or a pause.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch, for the records' `time`.
        measured: more fields of a step's record, such as the pipeline's bubble; asked for by every
            `record` on all ranks, so it may be a collective.
    """

    def __init__(
        self,
        workload: Workload,
        memory_max_gib: Callable[[], float],
        synchronize: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
        measured: Callable[[], Record] = dict,
    ) -> None:
        self.workload = workload
        self._memory_max_gib = memory_max_gib
        self._synchronize = synchronize
        self._clock = clock
        self._wall_clock = wall_clock
        self._measured = measured
        self.start()

    def start(self) -> None:
        """Forgets everything and starts the clock: call it right before the first step."""
        self._losses: list[SupportsFloat] = []
        self._grad_norm: SupportsFloat | None = None
        self._loss_scale: float | None = None
        self._skipped = 0
        self._paused = 0.0
        self._since = self._clock()

    def step(
        self,
        loss: SupportsFloat,
        grad_norm: SupportsFloat | None,
        loss_scale: float | None = 1.0,
        *,
        updated: bool = True,
    ) -> None:
        """One step that did work.

        Args:
            loss: mean loss of the global batch, nats a token.
            grad_norm: norm before clipping; None where the engine has none.
            loss_scale: fp16's scale, 1 elsewhere.
            updated: False where the work was done but the weights were not changed (fp16 overflow):
                the step counts as skipped in the counter and as work in the rates.
        """
        self._losses.append(loss)
        self._grad_norm = grad_norm
        self._loss_scale = loss_scale
        self._skipped += int(not updated)

    def skip(self) -> None:
        """One step that was skipped; its time belongs inside `off_the_clock`."""
        self._skipped += 1

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What happens inside is no step's time; work queued before it is waited for and counts."""
        self._synchronize()
        start = self._clock()
        try:
            yield
        finally:
            self._synchronize()
            self._paused += self._clock() - start

    def record(
        self, state: RunState, learning_rate: float, corpus_loss: Mapping[str, float] | None = None
    ) -> Record:
        """The record of the interval that ends with `state`, and the start of the next interval.

        Returns:
            event "step", or "skip" where no step since the last record did work. `loss` is the mean
            over the steps that did, not finite where one was not; `grad_norm` and `loss_scale` are
            the last step's; `elapsed_s` is seconds a step; `skipped_iterations` and
            `nan_iterations` count since the last record.
        """
        self._synchronize()
        seconds = self._clock() - self._since - self._paused
        losses = [float(loss) for loss in self._losses]
        measured = self._measured()
        record: Record = {
            "event": "step" if losses else "skip",
            "iteration": state.iteration,
            "train_iters": self.workload.train_iters,
            "time": self._wall_clock(),
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "learning_rate": learning_rate,
            "global_batch_size": self.workload.global_batch_size,
            "seq_length": self.workload.seq_length,
            "world_size": self.workload.world_size,
            "data_parallel": self.workload.data_parallel,
            "skipped_iterations": self._skipped,
            "nan_iterations": sum(not math.isfinite(loss) for loss in losses),
        }
        if losses:
            record |= {
                "steps": len(losses),
                "loss": sum(losses) / len(losses),
                "grad_norm": None if self._grad_norm is None else float(self._grad_norm),
                "loss_scale": self._loss_scale,
                **self.workload.rates(seconds / len(losses)),
                "memory_max_gib": self._memory_max_gib(),
                **measured,
            }
        if corpus_loss is not None:
            record["corpus_loss"] = dict(corpus_loss)
        self.start()
        return record
