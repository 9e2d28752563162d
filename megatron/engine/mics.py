"""MiCS: ZeRO-3 inside shard groups, replicas of them kept equal by one all-reduce a step.

DeepSpeed's own was removed in 0.19.7. DeepSpeed gets a shard group as its data-parallel group; the
gradients it has averaged there are averaged over the replicas here, before it takes their norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron.engine.own_groups import sub_axis
from megatron.parallel.groups import Axis


@dataclass(frozen=True)
class Shards:
    """The data-parallel axis as MiCS cuts it.

    Attributes:
        shard: the ranks that share one copy of all states: neighbours, so that they are near.
        replica: the ranks of equal place in their shard groups; they hold the same values.
    """

    shard: Axis
    replica: Axis


def cut_into_shards(dp: Axis, shard_size: int) -> Shards:
    """Shard groups of neighbours on the data-parallel axis.

    Args:
        dp: data-parallel axis.
        shard_size: divides it; 0: one group of all.
    """
    size = shard_size or dp.size
    assert dp.size % size == 0, f"{dp.size=} {shard_size=}"
    if size == dp.size:
        own = dp.ranks[dp.rank]
        return Shards(shard=dp, replica=Axis(group=None, rank=0, size=1, ranks=(own,)))
    first = dp.rank // size * size
    return Shards(
        shard=sub_axis(dp, range(first, first + size)),
        replica=sub_axis(dp, range(dp.rank % size, dp.size, size)),
    )


def average_over_replicas(zero_optimizer: Any, replica: Axis) -> None:
    """Averages the gradient partitions that the next step will take; nothing for one replica.

    Every replica then has the gradient of the global batch, hence one norm, one clip, one update;
    an infinity of one replica is seen by all.

    Forward only: an all-reduce of 1/shard_size of the gradients a step, in the type in which
    DeepSpeed reduces them inside a shard group.
    """
    if replica.group is None:
        return
    # The partitions of all parameters, one after the other; micro-batches accumulate into it.
    gradients = zero_optimizer.grad_partitions_flat_buffer
    mean = gradients.to(zero_optimizer.communication_data_type)
    dist.all_reduce(mean, group=replica.group)
    gradients.copy_(mean.div_(replica.size))
