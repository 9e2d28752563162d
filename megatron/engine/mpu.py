"""The group look-ups that DeepSpeed makes at PP = 1: it must know TP apart from DP."""

from __future__ import annotations

import torch.distributed as dist

from megatron.engine.own_groups import groups_of
from megatron.parallel.groups import Axis


class ModelParallelUnit:
    """Answers under the names that DeepSpeed asks for.

    Args:
        tp: tensor-parallel axis.
        dp: the ranks that ZeRO shares states over; with MiCS a shard group.
    """

    def __init__(self, tp: Axis, dp: Axis) -> None:
        self._tp, self._dp = tp, dp
        self._tp_group, self._dp_group = groups_of(tp, dp)

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dp_group
