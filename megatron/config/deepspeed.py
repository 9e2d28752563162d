"""RunConfig -> DeepSpeed's configuration: the only place that knows DeepSpeed's keys. Pure.

Written for DeepSpeed 0.19. Activation checkpointing, data and the learning rate are ours.
"""

from __future__ import annotations

from typing import Any

from megatron.config.pipeline_stages import num_stages_per_rank
from megatron.config.schema import RunConfig

NEVER = 2**31 - 1  # steps between DeepSpeed's own progress lines
LARGEST_BUCKET = 200_000_000  # elements reduced at once; its buffer is allocated whole


def deepspeed_config(run: RunConfig) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes, JSON-ready."""
    micro_batch = run.train.micro_batch_size
    accumulation = run.train.gradient_accumulation_steps
    config: dict[str, Any] = {
        # DeepSpeed counts the ranks that ZeRO shards over: with sequence parallelism each part of
        # a sample is a sample to it, and with MiCS it sees one shard group.
        "train_batch_size": run.zero_ranks * micro_batch * accumulation,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.clip_grad,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero(run),
    }
    config.update(_precision(run))
    if run.parallel.cpu_optimizer:
        # The optimizer is built by us; without this DeepSpeed insists on building its own.
        config["zero_force_ds_cpu_optimizer"] = False
    parallel = run.parallel
    dualpipev = num_stages_per_rank(parallel.pipeline_schedule) == 2
    if parallel.pipeline_parallel > 1 and (parallel.megatron_sequence_parallel or dualpipev):
        # By default each TP rank sends 1/TP of what all of them hold. Megatron's sequence
        # parallelism leaves them different values, and DualPipeV sends whole tensors only.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return config


def engine_zero_stage(run: RunConfig) -> int:
    """The stage that DeepSpeed is given.

    Stage 0 runs as stage 1: DeepSpeed's own stage 0 accumulates bf16 gradients in bf16, and under a
    pipeline its gradient norm, and so clipping, counts tied weights twice and drops unmarked ones.
    """
    return max(run.parallel.zero_stage, 1)


def _precision(run: RunConfig) -> dict[str, Any]:
    """Number formats; fp32 is DeepSpeed's default and needs no key."""
    dtype = run.train.dtype
    if dtype == "fp16":
        return {
            "fp16": {
                "enabled": True,
                "loss_scale": 0,  # dynamic
                "loss_scale_window": 1000,
                "hysteresis": 2,
                "min_loss_scale": 1,
            }
        }
    if dtype == "bf16":
        precision: dict[str, Any] = {
            "bf16": {"enabled": True},
            "communication_data_type": "bf16" if run.train.grad_reduce_in_bf16 else "fp32",
        }
        if engine_zero_stage(run) == 1:
            precision["data_types"] = {"grad_accum_dtype": "fp32"}
            # Each bf16 gradient is added and freed as it is made: 4 bytes a parameter, not 6.
            precision["bf16"]["immediate_grad_update"] = True
        return precision
    return {}


def _zero(run: RunConfig) -> dict[str, Any]:
    """What ZeRO shards, and how it communicates."""
    stage = engine_zero_stage(run)
    bucket = min(LARGEST_BUCKET, -(-run.parameters // run.parallel.tensor_parallel))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage < 3:
        zero["allgather_bucket_size"] = bucket
    else:
        zero["stage3_prefetch_bucket_size"] = min(50_000_000, bucket)
        zero["stage3_param_persistence_threshold"] = 100_000
        zero["stage3_max_live_parameters"] = 3_000_000_000
        zero["stage3_max_reuse_distance"] = 3_000_000_000
        zero["zero_hpz_partition_size"] = run.parallel.zero_hpz_partition_size
    if run.parallel.cpu_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return zero
