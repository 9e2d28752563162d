"""What is set before a step beside its learning rate, in runs that ask for it.

Each change is a pure function of the configuration and the step.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.config.pace import weight_decay
from megatron.config.schema import RunConfig
from megatron.data.loader import StepPlan
from megatron.engine import Engine
from megatron.training.optimizers.parameter_groups import VECTORS
from megatron.training.probes import Probes

Change = Callable[[int], None]
"""Called with the number of the step to come."""


def step_changes(run: RunConfig, engine: Engine, plan: StepPlan, probes: Probes) -> list[Change]:
    """The changes that a run asks for; most ask for none."""
    changes: list[Change] = []
    if run.batch_sizes.samples:

        def set_accumulation(iteration: int) -> None:
            engine.set_accumulation_steps(plan.at(iteration).gradient_accumulation_steps)

        changes.append(set_accumulation)
    if run.optimizer.weight_decay_incr_style != "constant":

        def set_weight_decay(iteration: int) -> None:
            for group in engine.optimizer.param_groups:
                if group["name"] != VECTORS:
                    group["weight_decay"] = weight_decay(run, iteration)

        changes.append(set_weight_decay)
    if run.log.log_num_zeros_in_grad:
        changes.append(probes.before_step)
    return changes
