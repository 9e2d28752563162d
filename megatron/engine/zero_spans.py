"""Where DeepSpeed's optimizers keep the fp32 weights, and the model's weights rebuilt from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.engine.shards import Span


def zero_spans(zero: Any) -> list[Span]:
    """The runs this rank updates, for ZeRO 1, 2, 3 and DeepSpeed's bf16 optimizer."""
    kind = type(zero).__name__
    if _is_stage3(zero):
        return list(_stage3_spans(zero))
    if kind == "BF16_Optimizer":
        groups, flats = zero.bf16_groups, zero.fp32_groups_flat_partition
    elif kind == "DeepSpeedZeroOptimizer":
        groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
    else:
        raise AssertionError(f"no checkpoint support for DeepSpeed's {kind}")
    return [
        Span(parameter, flat, fp32.start, own.start, own.numel)
        for group, flat in zip(groups, flats, strict=True)
        for parameter in group
        if parameter._hp_mapping is not None
        for fp32 in [parameter._hp_mapping.hp_fragment_address]
        for own in [parameter._hp_mapping.lp_fragment_address]
    ]


def refresh_weights(zero: Any) -> None:
    """Rebuilds the model's weights from the fp32 ones, on all data-parallel ranks."""
    if not _is_stage3(zero):
        zero._hp_optimizer_states_linked = False  # relinked at the next step
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    zero.invalidate_secondary_tensor()


def _is_stage3(zero: Any) -> bool:
    return type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3"


def _stage3_spans(zero: Any) -> Iterator[Span]:
    for parameters in zero.fp16_groups:
        for parameter in parameters:
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            partition = parameter.ds_tensor.ds_numel
            start = zero._get_param_partition_rank(parameter) * partition
            length = min(partition, parameter.ds_numel - start)  # the last partition is padded
            if length > 0:
                flat = zero.fp32_partitioned_groups_flat[group]
                yield Span(parameter, flat, offset, start, length)
