"""RAMPUP_BATCH_SIZE: a step has as many micro-batches as its own batch needs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.batch_sizes import BatchSizes
from megatron.config.schema import RunConfig
from megatron.data.loader import StepPlan
from megatron.parallel.groups import Axis


@dataclass(frozen=True)
class GrowingPlan(StepPlan):
    """The plan of the full batch, and how the batch grows to it."""

    sizes: BatchSizes

    def at(self, iteration: int) -> StepPlan:
        """The plan of step `iteration`."""
        size = self.sizes.of(iteration)
        each = self.micro_batch_size * self.data_parallel_size
        rank, ranks = self.data_parallel_rank, self.data_parallel_size
        return StepPlan(size, self.micro_batch_size, size // each, rank, ranks)


def step_plans(run: RunConfig, dp: Axis) -> tuple[StepPlan, StepPlan]:
    """This rank's plan of an evaluation, which has the full batch, and that of the run's steps."""
    train, sizes = run.train, run.batch_sizes
    micro, accumulation = train.micro_batch_size, train.gradient_accumulation_steps
    full = StepPlan(sizes.full, micro, accumulation, dp.rank, dp.size)
    if not sizes.samples:
        return full, full
    return full, GrowingPlan(sizes.full, micro, accumulation, dp.rank, dp.size, sizes)
