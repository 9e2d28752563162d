"""ZeRO-3 beyond a configuration key: partitioned initialisation, hpZ's second partition, and MiCS.

MiCS is ZeRO-3 inside shard groups: DeepSpeed gets a shard group as its data-parallel group, and
the gradients that it has averaged there are averaged over the replicas here, before a step.
"""

from __future__ import annotations

import contextlib
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from megatron.engine.distributed import ModelParallelUnit, sub_axis
from megatron.parallel.groups import Axis


def partitioned_initialisation(
    config: dict[str, Any], mpu: ModelParallelUnit
) -> contextlib.AbstractContextManager[None]:
    """A context in which each module's parameters are partitioned as soon as it is built.

    A rank never holds more than its partitions and one module's own parameters, so a model may be
    larger than a rank's memory. Below stage 3 it does nothing.

    Args:
        config: DeepSpeed's.
        mpu: gives the data-parallel ranks.
    """
    if config["zero_optimization"]["stage"] < 3:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = deepspeed.zero.Init(
        config_dict_or_path=config,
        mpu=mpu,
        data_parallel_group=mpu.get_data_parallel_group(),
        zero_param_parallel_group=deepspeed_groups._get_zero_param_intra_parallel_group(),
    )
    return context


def make_secondary_group(size: int, dp: Axis) -> None:
    """Gives DeepSpeed the ranks of hpZ's second partition: `size` neighbours on the dp axis.

    Args:
        size: ranks that hold all weights among them; 1: hpZ is off.
        dp: data-parallel axis; `size` divides it.
    """
    if size == 1:
        return
    first = dp.rank // size * size
    # For all ranks, use the axis' own group: DeepSpeed lists a group's ranks, and does not
    # terminate for the world's group.
    secondary = dp if size == dp.size else sub_axis(dp, range(first, first + size))
    deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = secondary.group


def mics_axes(dp: Axis, shard_size: int) -> tuple[Axis, Axis]:
    """The data-parallel axis as MiCS divides it.

    Args:
        dp: data-parallel axis.
        shard_size: divides it; 0: one shard group of all.

    Returns:
        The shard axis, neighbours that partition all states; and the replica axis, the ranks of
        equal place in their shard groups, which hold equal values.
    """
    size = shard_size or dp.size
    assert dp.size % size == 0, f"{dp.size=} {shard_size=}"
    first = dp.rank // size * size
    shard = dp if size == dp.size else sub_axis(dp, range(first, first + size))
    return shard, sub_axis(dp, range(dp.rank % size, dp.size, size))


def average_over_replicas(zero: Any, replica: Axis) -> None:
    """Averages the gradient partitions that the next step will take.

    Every replica then has the gradient of the global batch, hence one norm, one clip, one update;
    all replicas see an infinity of one.

    Forward only: an all-reduce of 1/shard_size of the gradients per step, in the type in which
    DeepSpeed reduces them inside a shard group.
    """
    # The partitions of all parameters, one after the other; micro-batches accumulate into it.
    gradients = zero.grad_partitions_flat_buffer
    mean = gradients.to(zero.communication_data_type)
    dist.all_reduce(mean, group=replica.group)
    gradients.copy_(mean.div_(replica.size))
