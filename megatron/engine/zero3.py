"""ZeRO-3 beyond a configuration key: partitioned initialisation and hpZ's second partition."""

from __future__ import annotations

import contextlib
from typing import Any

import deepspeed
from deepspeed.utils import groups as deepspeed_groups

from megatron.engine.mpu import ModelParallelUnit
from megatron.engine.own_groups import sub_axis
from megatron.parallel.groups import Axis


def partitioned_initialisation(
    config: dict[str, Any], mpu: ModelParallelUnit
) -> contextlib.AbstractContextManager[None]:
    """A context in which each module's parameters are shared out as soon as it is built.

    A rank never holds more than its shares and one module's own parameters, so a model may be
    larger than a rank's memory. Below stage 3 it does nothing.

    Args:
        config: DeepSpeed's.
        mpu: whose data-parallel ranks share.
    """
    if config["zero_optimization"]["stage"] < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.Init(
        config_dict_or_path=config,
        mpu=mpu,
        data_parallel_group=mpu.get_data_parallel_group(),
        zero_param_parallel_group=deepspeed_groups._get_zero_param_intra_parallel_group(),
    )


def make_secondary_group(size: int, dp: Axis) -> None:
    """Gives DeepSpeed the ranks of hpZ's second partition: `size` neighbours on the dp axis.

    DeepSpeed would take neighbours in the world, which under TP hold different slices of a matrix.

    Args:
        size: ranks that hold all weights among them; 1: hpZ is off.
        dp: data-parallel axis; `size` divides it.
    """
    if size == 1:
        return
    first = dp.rank // size * size
    # Of all ranks it is the axis' own group: DeepSpeed lists a group's ranks, and of the world's
    # group finds no end.
    secondary = dp if size == dp.size else sub_axis(dp, range(first, first + size))
    deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = secondary.group
