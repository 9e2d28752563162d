"""Every change to DeepSpeed's own behaviour: what, why, and when it can be dropped.

`PATCHES` is the list; the small ones are written out below it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megatron.config.errors import ConfigError
from megatron.parallel.groups import new_group


class Patch(NamedTuple):
    """One change.

    Attributes:
        theirs: DeepSpeed's function or variable.
        ours: its replacement.
        why: what goes wrong without the patch.
        drop_when: the check that passes without the patch once it is not needed.
    """

    theirs: str
    ours: str
    why: str
    drop_when: str


PATCHES = (
    Patch(
        "deepspeed.comm.new_group",
        "megatron.engine.patches.patch_new_group",
        "DeepSpeed makes every group of the world on every rank: a start-up that grows with it",
        "tests/startup/test_startup.py",
    ),
    Patch(
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
        ".initialize_gradient_partitioning_data_structures",
        "megatron.engine.patches.patch_partition_tables",
        "it looks at every parameter for every data-parallel rank: seconds on thousands of ranks",
        "tests/startup/test_startup.py; tests/engine/test_patches.py compares the tables",
    ),
    Patch(
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.scaled_global_norm",
        "megatron.engine.patches.patch_global_grad_norm",
        "it sums each parameter group's norm over all stages in turn; a stage without embedding or"
        " head has a group fewer, and the run deadlocks",
        "tests/equivalence/test_pipeline_schedules.py with fp32 and PP 4",
    ),
    Patch(
        "deepspeed.runtime.pipe.engine.PipelineEngine._exec_reduce_tied_grads",
        "megatron.engine.patches.reduce_tied_gradients",
        "it looks for gradients in `grad`; bf16 with the optimizer on the host accumulates them in"
        " `grad_accum`, where they are not summed over stages",
        "tests/equivalence/test_zero_layouts.py: tied weights with the optimizer on the host",
    ),
    Patch(
        "deepspeed.runtime.pipe.engine.PipelineEngine._INSTRUCTION_MAP",
        "megatron.engine.pipeline.PipelineEngine",
        "DeepSpeed does not measure the pipeline bubble; forward and backward passes are timed",
        "DeepSpeed reports the time of a stage's passes",
    ),
    Patch(
        "deepspeed.runtime.pipe.topology.PipelineParallelGrid",
        "megatron.engine.pipeline_module.Grid",
        "it makes every group of the world; with its topology it searches all ranks at every send",
        "tests/startup/test_startup.py",
    ),
    Patch(
        "deepspeed.runtime.pipe.module.PipelineModule._partition_layers",
        "megatron.engine.pipeline_module.Stages",
        "its search for stage bounds builds every layer on every rank; ours are given",
        "PipelineModule takes bounds",
    ),
    Patch(
        "deepspeed.runtime.pipe.module.PipelineModule._index_tied_modules",
        "megatron.engine.pipeline_module.Stages",
        "it makes the groups of the tied weights of all ranks",
        "tests/startup/test_startup.py",
    ),
    Patch(
        "deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP",
        "megatron.engine.zero3.make_secondary_group",
        "hpZ takes neighbours in the world, which under TP hold different shards of a matrix",
        "tests/equivalence/test_zero_layouts.py with hpz-tp2",
    ),
    Patch(
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.step",
        "megatron.engine.zero3.average_over_replicas",
        "DeepSpeed removed MiCS in 0.19.7; gradients are averaged over its replicas before a step",
        "DeepSpeed has MiCS again, and tests/equivalence/test_zero_layouts.py passes with it",
    ),
    Patch(
        "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported",
        "megatron.engine.patches.patch_cpu_accelerator",
        "DeepSpeed requires fp16 instructions; torch computes fp16 on every CPU, if slowly",
        "a run with DTYPE=fp16 starts on a CPU without them",
    ),
    Patch(
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler.update_scale",
        "megatron.engine.zero.ZeroEngine",
        "an overflow at the lowest loss scale raises a bare Exception; the run's own count of bad"
        " steps decides",
        "DeepSpeed's configuration has it",
    ),
    Patch(
        "deepspeed.runtime.bf16_optimizer.BF16_Optimizer.step",
        "megatron.engine.older.reject_overflows",
        "before 0.19.8 gradients that are not finite are applied, in other types than fp16",
        "0.19.8 is the oldest version; tests/engine/test_gate.py passes under the oldest",
    ),
    Patch(
        "deepspeed.runtime.pipe.engine.PipelineEngine._backward_prologue_per_tensor",
        "megatron.engine.older.scale_in_the_loss",
        "before 0.19.6 gradients are divided by the micro-batches behind the head, which would keep"
        " its own undivided",
        "0.19.6 is the oldest version; tests/engine/test_other_versions.py",
    ),
    Patch(
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.step",
        "megatron.engine.norm_gradients.sum_before_steps",
        "it averages gradients and takes their norm with nothing in between: norms' gradients are"
        " summed over the tensor-parallel ranks there, not once per norm and micro-batch",
        "DeepSpeed calls a function between the two",
    ),
    Patch(
        "deepspeed.ops.__compatible_ops__",
        "megatron.engine.patches.patch_cpu_accelerator",
        "on a CPU DeepSpeed compiles a C++ all-reduce that only its inference uses: half a minute,"
        " and a compiler",
        "init_distributed starts without a compiler",
    ),
    Patch(
        "deepspeed.initialize",
        "megatron.engine.make_engine",
        "rescanning imported objects for garbage dominated DeepSpeed's table construction: they are"
        " frozen first",
        "tests/startup/test_startup.py",
    ),
)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, a name of a DeepSpeed module or class has another value."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def patch_cpu_accelerator() -> None:
    """Lets a host without accelerator start in fp16, and without a compiler."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True


def require_accelerator(device: torch.device) -> None:
    """DeepSpeed chooses a kind of device when it is imported: it must be this rank's.

    Raises:
        ConfigError: it is not.
    """
    chosen = deepspeed.get_accelerator().device_name()
    if chosen != device.type:
        raise ConfigError(
            f"this rank computes on {device.type}, but DeepSpeed has chosen {chosen} "
            f"(DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR', '')}): set DEVICE={device.type}, "
            f"and where another launcher starts the ranks DS_ACCELERATOR={device.type} too"
        )


def patch_new_group() -> contextlib.AbstractContextManager[None]:
    """Inside, DeepSpeed makes its groups with `members_group`."""
    return replaced(deepspeed.comm, "new_group", members_group)


def members_group(ranks: Iterable[int]) -> Any:
    """A group made by its members only; for all ranks, the world's own group.

    Returns:
        The group, or GroupMember.NON_GROUP_MEMBER on a rank that is not in it.
    """
    ranks = list(ranks)
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if dist.get_rank() not in ranks:
        return dist.GroupMember.NON_GROUP_MEMBER
    return new_group(ranks)


def patch_global_grad_norm(zero: Any, device: torch.device) -> None:
    """Gives DeepSpeed's optimizer a norm that takes one all-reduce over a replica of the model.

    Args:
        zero: changed in place; an optimizer that sums once already is left alone.
        device: whose collectives the run uses; the optimizer's own may be the host.
    """
    if type(zero).__name__ != "DeepSpeedZeroOptimizer":
        return
    own_norm = zero.scaled_global_norm

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        over_stages = zero._model_parallel_all_reduce
        zero._model_parallel_all_reduce = lambda tensor, op: None
        try:
            own = torch.as_tensor(own_norm(norm_type), device=device).float()
        finally:
            zero._model_parallel_all_reduce = over_stages
        square = own**2  # inf where DeepSpeed found a gradient that is not finite
        over_stages(tensor=square, op=dist.ReduceOp.SUM)
        return square.sqrt()

    zero.scaled_global_norm = scaled_global_norm


def reduce_tied_gradients(engine: Any) -> None:
    """Sums the gradients of tied weights over the stages that use them, before all reductions."""
    if not getattr(engine.optimizer, "use_grad_accum_attribute", False):
        engine._exec_reduce_tied_grads()
        return
    for weight, group in engine.module.get_tied_weights_and_groups():
        dist.all_reduce(weight.grad_accum, group=group)


def patch_partition_tables() -> contextlib.AbstractContextManager[None]:
    """Inside, DeepSpeed's optimizers for ZeRO 1 and 2 make their tables with `fill_tables`."""
    name = "initialize_gradient_partitioning_data_structures"
    return replaced(DeepSpeedZeroOptimizer, name, fill_tables)


def fill_tables(zero: Any) -> None:
    """For each group of parameters, flattened and split into equal partitions, one per rank:

    - the partitions of a parameter, and the number of parameters in a partition;
    - where in the partition a parameter goes, and from where of the parameter;
    - the first parameter of a partition, None where there is padding only.

    Parameters follow each other without gaps: DeepSpeed's parameter_alignment is off.
    """
    for group, parameters in enumerate(zero.round_robin_bit16_groups):
        ranks = range(dist.get_world_size(group=zero.real_dp_process_group[group]))
        size = int(zero.partition_size[group])  # a float before 0.19.7
        ids: dict[int, list[int]] = {}
        count = dict.fromkeys(ranks, 0)
        first: dict[int, int | None] = dict.fromkeys(ranks)
        into: dict[int, dict[int, int]] = {rank: {} for rank in ranks}
        source: dict[int, dict[int, int]] = {rank: {} for rank in ranks}
        begin = 0
        for index, parameter in enumerate(parameters):
            key, end = zero.get_param_id(parameter), begin + parameter.numel()
            ids[key] = list(range(begin // size, (end - 1) // size + 1))
            for rank in ids[key]:
                into[rank][key] = max(begin - rank * size, 0)
                source[rank][key] = max(rank * size - begin, 0)
                count[rank] += 1
                if first[rank] is None:
                    first[rank] = index
            begin = end
        zero.param_to_partition_ids[group] = ids
        zero.total_grads_in_partition[group] = count
        zero.remaining_grads_in_partition[group] = {}
        zero.is_partition_reduced[group] = dict.fromkeys(ranks, False)
        zero.is_grad_computed[group] = {rank: dict.fromkeys(into[rank], False) for rank in ranks}
        zero.grad_partition_insertion_offset[group] = into
        zero.grad_start_offset[group] = source
        zero.first_param_index_in_partition[group] = first
