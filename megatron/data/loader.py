"""Micro-batches of one data-parallel rank, prefetched by a thread so that steps do not wait.

Only the listed steps are read; skipped steps are not listed. The samples of a step depend only on
how many were consumed before it and on the plan.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.data.dataset import SampleSource

# Steps kept ready; two hide a slow read behind the previous step, more only cost memory.
PREFETCH_STEPS = 2
_POLL_SECONDS = 0.1
HOST = torch.device("cpu")


@dataclass(frozen=True)
class StepPlan:
    """How the samples of a step are divided among micro-batches and data-parallel ranks."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    data_parallel_rank: int
    data_parallel_size: int

    def __post_init__(self) -> None:
        """Refuse a plan whose parts do not make up the batch."""
        mbs, gas = self.micro_batch_size, self.gradient_accumulation_steps
        dp = self.data_parallel_size
        if min(mbs, gas, dp) < 1 or self.global_batch_size != mbs * gas * dp:
            raise ValueError(
                f"GLOBAL_BATCH = {self.global_batch_size}, but MICRO_BATCH x GRAD_ACC_STEPS x DP = "
                f"{mbs} x {gas} x {dp} = {mbs * gas * dp}: change one of them"
            )
        assert 0 <= self.data_parallel_rank < dp

    def at(self, iteration: int) -> StepPlan:
        """The plan of step `iteration`: this one, unless the batch grows."""
        return self

    def micro_batch(self, consumed_samples: int, number: int) -> range:
        """Global samples of this rank's micro-batch `number` in the step at `consumed_samples`."""
        start = consumed_samples + number * self.micro_batch_size * self.data_parallel_size
        start += self.data_parallel_rank * self.micro_batch_size
        return range(start, start + self.micro_batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass; tokens and labels are views of one block, so not contiguous."""

    iteration: int
    block: torch.Tensor  # int64 (B, S + 1), contiguous
    corpora: tuple[str, ...]  # of each sample

    @property
    def tokens(self) -> torch.Tensor:
        """int64 (B, S)."""
        return self.block[:, :-1]

    @property
    def labels(self) -> torch.Tensor:
        """int64 (B, S), the token after each of `tokens`."""
        return self.block[:, 1:]


@dataclass(frozen=True)
class _Failure:
    """Exception from the prefetch thread, re-raised in the consumer."""

    error: BaseException


_Item = list[MicroBatch] | _Failure | None  # a step, an error, or the end


class Loader:
    """Iterates over the micro-batches of given steps, in order; close it, or use it in a `with`."""

    def __init__(
        self,
        dataset: SampleSource,
        plan: StepPlan,
        steps: Iterable[tuple[int, int]],
        prefetch_steps: int = PREFETCH_STEPS,
        device: torch.device = HOST,
    ) -> None:
        """Begin to read.

        Args:
            dataset: gives global sample k.
            plan: this rank's part of a step.
            steps: (iteration, samples consumed before it) of the steps to read; the thread
                iterates over them.
            prefetch_steps: whole steps kept ready.
            device: where the micro-batches go, each by one copy that nothing waits for: it is from
                pinned memory and queued when the micro-batch is taken. On the host none is made.
        """
        assert prefetch_steps >= 1
        self.waited_s = 0.0  # seconds that the consumer waited for data
        self._ready: queue.Queue[_Item] = queue.Queue(maxsize=prefetch_steps)
        self._stop, self._device = threading.Event(), device
        self._batches = self._consume()
        self._thread = threading.Thread(
            target=self._produce, args=(dataset, plan, steps), name="data-loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[MicroBatch]:
        """The loader itself."""
        return self

    def __next__(self) -> MicroBatch:
        """Next micro-batch.

        Raises:
            StopIteration: after the last step, or once closed.
            Exception: any error of the reading thread, unchanged.
        """
        batch = next(self._batches)
        return replace(batch, block=batch.block.to(self._device, non_blocking=True))

    def close(self) -> None:
        """Stop reading and wait for the thread; may be called twice."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Loader:
        """The loader itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def _consume(self) -> Iterator[MicroBatch]:
        while (item := self._take()) is not None:
            if isinstance(item, _Failure):
                raise item.error
            yield from item

    def _take(self) -> _Item:
        """Next item of the queue, or None once the loader is closed."""
        started = time.perf_counter()
        try:
            while not self._stop.is_set():
                try:
                    return self._ready.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
            return None
        finally:
            self.waited_s += time.perf_counter() - started

    def _produce(
        self, dataset: SampleSource, plan: StepPlan, steps: Iterable[tuple[int, int]]
    ) -> None:
        try:
            if self._device != HOST:  # a thread begins on the first device, and would open it
                torch.accelerator.set_device_index(self._device)
            for iteration, consumed in steps:
                batches = []
                for number in range(plan.at(iteration).gradient_accumulation_steps):
                    if self._stop.is_set():
                        return
                    samples = plan.micro_batch(consumed, number)
                    batches.append(_read(dataset, iteration, samples, self._device != HOST))
                self._put(batches)
            self._put(None)
        except BaseException as error:  # re-raised in the consumer
            self._put(_Failure(error))

    def _put(self, item: _Item) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue


def _read(dataset: SampleSource, iteration: int, samples: range, pins: bool) -> MicroBatch:
    read = [dataset.sample(k) for k in samples]
    block = torch.from_numpy(np.stack([sample.tokens for sample in read]))  # (B, S + 1)
    corpora = tuple(sample.corpus for sample in read)
    return MicroBatch(iteration, block.pin_memory() if pins else block, corpora)
