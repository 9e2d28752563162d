"""The gradient norm over pipeline stages that have different parameter groups.

DeepSpeed's ZeRO-1 sums each group's norm over all stages in turn. A stage without the embedding or
the head has a group fewer, and waits for ever; here each stage sums its own groups first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_stages_once(zero_optimizer: Any, device: torch.device) -> None:
    """Gives DeepSpeed's optimizer a norm of one all-reduce over the ranks of a model copy.

    Args:
        zero_optimizer: changed in place; one that sums once already is left alone.
        device: whose collectives the run uses; the optimizer's own may be the host.
    """
    if type(zero_optimizer).__name__ != "DeepSpeedZeroOptimizer":
        return
    own_norm = zero_optimizer.scaled_global_norm

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        over_stages = zero_optimizer._model_parallel_all_reduce
        zero_optimizer._model_parallel_all_reduce = _leave_alone
        try:
            own = torch.as_tensor(own_norm(norm_type), device=device).float()
        finally:
            zero_optimizer._model_parallel_all_reduce = over_stages
        square = own**2  # inf where DeepSpeed found a gradient that is not finite
        over_stages(tensor=square, op=dist.ReduceOp.SUM)
        return square.sqrt()

    zero_optimizer.scaled_global_norm = scaled_global_norm


def _leave_alone(tensor: Tensor, op: Any) -> None:
    del tensor, op
