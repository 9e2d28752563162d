"""Sums partial gradients over the tensor-parallel ranks inside DeepSpeed, once per step.

DeepSpeed averages over the data-parallel ranks first; the sum of the averages is the average of
the sums. So only the owner of a gradient's partition sums it, with the same owner's of the other
tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron.model.norm import RMSNorm
from megatron.parallel.biased import ReplicatedWeights
from megatron.parallel.groups import Axis
from megatron.parallel.partial_gradients import is_partial, sum_parts

# DeepSpeed's optimizer -> names of its lists of parameters, and of what a step takes as their
# gradients (with ZeRO, of those in this rank's partition).
GRADIENTS = {
    "BF16_Optimizer": ("bf16_groups", "fp32_groups_gradients"),
    "DeepSpeedZeroOptimizer": ("params_in_partition", "averaged_gradients"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp16_groups", "averaged_gradients"),
}


def sum_in_backward(module: nn.Module) -> None:
    """Replicated weights sum their gradients themselves from now on, in each backward pass."""
    for part in module.modules():
        if isinstance(part, RMSNorm | ReplicatedWeights):
            part.sum_in_backward()


def sum_before_steps(zero: Any, module: nn.Module, tp: Axis) -> None:
    """Makes DeepSpeed's optimizer sum the module's partial gradients before each of its steps.

    Args:
        zero: changed in place.
        module: this rank's part of the model.
        tp: tensor-parallel axis.
    """
    if not any(is_partial(parameter) for parameter in module.parameters()):
        return
    step = zero.step

    def summed_step(*args: Any, **kwargs: Any) -> Any:
        sum_parts(_parts(zero), tp)
        return step(*args, **kwargs)

    zero.step = summed_step


def _parts(zero: Any) -> list[Tensor]:
    parameters, gradients = (getattr(zero, name) for name in GRADIENTS[type(zero).__name__])
    return [
        gradient
        for index, group in enumerate(parameters)
        # A partition may end with padding, which no parameter names.
        for parameter, gradient in zip(group, gradients[index], strict=False)
        if is_partial(parameter)
    ]
