"""ZeRO-1 and 2's tables of which parameter lies where, made in one pass over the parameters.

DeepSpeed looks at every parameter for every data-parallel rank: seconds on thousands of ranks.
Same tables, checked against DeepSpeed's own by a test.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megatron.engine.own_groups import replaced


def made_in_one_pass() -> contextlib.AbstractContextManager[None]:
    """Inside, DeepSpeed's optimizers for ZeRO 1 and 2 make their tables with `fill_tables`."""
    name = "initialize_gradient_partitioning_data_structures"
    return replaced(DeepSpeedZeroOptimizer, name, fill_tables)


def fill_tables(zero: Any) -> None:
    """For each group of parameters, flattened and cut into equal partitions, one a rank:

    - the partitions of a parameter, and the number of parameters in a partition;
    - where in the partition a parameter goes, and from where of the parameter;
    - the first parameter of a partition, None where there is padding only.
    """
    for group, parameters in enumerate(zero.round_robin_bit16_groups):
        ranks = range(dist.get_world_size(group=zero.real_dp_process_group[group]))
        size = zero.partition_size[group]
        ids: dict[int, list[int]] = {}
        count = dict.fromkeys(ranks, 0)
        first: dict[int, int | None] = dict.fromkeys(ranks)
        into: dict[int, dict[int, int]] = {rank: {} for rank in ranks}
        source: dict[int, dict[int, int]] = {rank: {} for rank in ranks}
        begin = 0
        padding = zero.round_robin_bit16_padding[group]
        for index, (parameter, padded) in enumerate(zip(parameters, padding, strict=True)):
            key, end = zero.get_param_id(parameter), begin + parameter.numel()
            ids[key] = list(range(begin // size, (end - 1) // size + 1))
            for rank in ids[key]:
                into[rank][key] = max(begin - rank * size, 0)
                source[rank][key] = max(rank * size - begin, 0)
                count[rank] += 1
                if first[rank] is None:
                    first[rank] = index
            begin = end + padded
        zero.param_to_partition_ids[group] = ids
        zero.total_grads_in_partition[group] = count
        zero.remaining_grads_in_partition[group] = {}
        zero.is_partition_reduced[group] = dict.fromkeys(ranks, False)
        zero.is_grad_computed[group] = {rank: dict.fromkeys(into[rank], False) for rank in ranks}
        zero.grad_partition_insertion_offset[group] = into
        zero.grad_start_offset[group] = source
        zero.first_param_index_in_partition[group] = first
