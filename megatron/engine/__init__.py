"""The training engine: our own sharded step, or DeepSpeed, behind one interface.

One stage runs `Stack` under ShardedEngine or DeepSpeedEngine, more stages `PipelineModule` under
PipelineEngine. All use the same list of layers and the same parameter names, and give the same
losses. No other package imports deepspeed; `patches.py` lists the changes to it.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from torch import nn

from megatron.config.engine_choice import ShardedSettings
from megatron.engine.compiled import compiled_layer, warm_up
from megatron.engine.distributed import (
    ModelParallelUnit,
    quiet,
    start_distributed,
    stop_distributed,
)
from megatron.engine.document_engine import (
    DocumentPipelineEngine,
    DocumentShardedEngine,
    DocumentZeroEngine,
    FollowsDocuments,
)
from megatron.engine.gathering import Gathering
from megatron.engine.interface import (
    Engine,
    Gate,
    MakeOptimizer,
    MicroBatches,
)
from megatron.engine.norm_gradients import sum_before_steps, sum_in_backward
from megatron.engine.older import reject_overflows
from megatron.engine.patches import patch_new_group, patch_partition_tables, require_accelerator
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.pipeline_schedules import pipeline_module
from megatron.engine.sharded import DTYPES, ShardedEngine
from megatron.engine.shards import ReadPiece, Shards, Span
from megatron.engine.zero import ZeroEngine
from megatron.engine.zero3 import make_secondary_group, mics_axes, partitioned_initialisation
from megatron.model.document_mask import Documents, follow_documents
from megatron.model.layer import Layer
from megatron.model.stack import Stack
from megatron.parallel.groups import SERIAL, Axis, Groups
from megatron.parallel.head_loss import TargetsOf

log = logging.getLogger(__name__)

__all__ = [
    "Engine",
    "Gate",
    "MakeOptimizer",
    "MicroBatches",
    "ReadPiece",
    "Shards",
    "Span",
    "make_engine",
    "start_distributed",
    "start_engine",
    "stop_distributed",
    "warm_up",
]


def make_engine(
    layers: Sequence[Layer],
    targets: TargetsOf,
    make_optimizer: MakeOptimizer,
    groups: Groups,
    device: torch.device,
    deepspeed_config: dict[str, Any],
    *,
    stage_bounds: Sequence[int],
    sharded: ShardedSettings | None = None,
    compiled_shape: tuple[int, int, int] | None = None,
    recompute_num_layers: int = 0,
    mics_shard_size: int = 0,
    pipeline_schedule: str = "1f1b",
    documents: Documents | None = None,
) -> Engine:
    """Builds this rank's part of the model and starts DeepSpeed; a collective of all ranks.

    Args:
        layers: the model.
        targets: what the loss of a micro-batch is measured against.
        make_optimizer: from the named parameters of this rank's part.
        groups: of this rank.
        device: where the model lives.
        deepspeed_config: DeepSpeed's JSON as a dict.
        stage_bounds: into the list of layers, one more than there are stages (two stages per rank
            with the schedule dualpipev).
        sharded: of our own engine; None: DeepSpeed takes the steps.
        compiled_shape: (B, s, H) of a block's input, for which each is compiled; None: eager.
        recompute_num_layers: keep the input of every n-th block only; 0: leave it to the blocks.
        mics_shard_size: ZeRO-3 partitions inside groups of this many data-parallel ranks; 0: over
            all.
        pipeline_schedule: 1f1b or dualpipev.
        documents: what masks and positions within documents follow; None: none are asked for.

    Raises:
        ConfigError: DeepSpeed has chosen another kind of device, or lacks the schedule.
    """
    require_accelerator(device)
    # Exclude imported objects from garbage collection: rescanning them dominated DeepSpeed's table
    # construction.
    gc.freeze()
    if documents is not None:
        layers = [follow_documents(layer, documents) for layer in layers]
    if compiled_shape:
        layers = [
            compiled_layer(layer, compiled_shape) if layer.recompute else layer for layer in layers
        ]
    if sharded is not None:
        gathering, dtype = Gathering(), DTYPES[sharded.dtype]
        layers = [_moved(layer, device, dtype) for layer in layers]
        if groups.dp_sp.size > 1:
            layers = [gathering.waiting(layer) for layer in layers]
        module = Stack(layers, recompute_num_layers, targets)
        log.debug(f"the model on this rank:\n{module}")
        kind = ShardedEngine if documents is None else DocumentShardedEngine
        return _followed(
            kind(module, make_optimizer, groups, device, sharded, gathering), documents
        )
    # For ZeRO and gradient averaging, sequence-parallel ranks are data-parallel ranks.
    merged = groups.without_sequence()
    if groups.layout.pp > 1:
        stages = pipeline_module(
            layers, targets, merged, stage_bounds, recompute_num_layers, pipeline_schedule
        )
        log.debug(f"layers of this stage:\n{stages}")
        engine = start_engine(
            PipelineEngine if documents is None else DocumentPipelineEngine,
            stages,
            make_optimizer,
            groups,
            device,
            deepspeed_config,
        )
        return _followed(engine, documents)
    shard, replica = mics_axes(merged.dp, mics_shard_size)
    make_secondary_group(
        deepspeed_config["zero_optimization"].get("zero_hpz_partition_size", 1), merged.dp
    )
    mpu = ModelParallelUnit(groups.tp, shard)
    with quiet(), partitioned_initialisation(deepspeed_config, mpu):
        module = Stack(layers, recompute_num_layers, targets)
    log.debug(f"the model on this rank:\n{module}")
    engine = start_engine(
        ZeroEngine if documents is None else DocumentZeroEngine,
        module,
        make_optimizer,
        groups,
        device,
        deepspeed_config,
        mpu,
        replica,
    )
    return _followed(engine, documents)


def _followed(engine: Engine, documents: Documents | None) -> Engine:
    if isinstance(engine, FollowsDocuments):
        assert documents is not None
        engine.follow(documents)
    return engine


def start_engine(
    kind: type[ZeroEngine],
    module: nn.Module,
    make_optimizer: MakeOptimizer,
    groups: Groups,
    device: torch.device,
    deepspeed_config: dict[str, Any],
    mpu: ModelParallelUnit | None = None,
    replica: Axis = SERIAL,
) -> ZeroEngine:
    """Starts DeepSpeed around a module; a collective of all ranks.

    Args:
        kind: of the engine.
        module: this rank's part of the model, as the engine takes it.
        make_optimizer, groups, device, deepspeed_config: as `make_engine` has them.
        mpu: DeepSpeed's model-parallel unit; None where the module has its own.
        replica: MiCS' ranks with equal states.
    """
    if "offload_optimizer" in deepspeed_config["zero_optimization"]:
        sum_in_backward(module)  # gradients go to the host, and into the norm, as they are made
    optimizer = make_optimizer(module.named_parameters())
    with quiet(), patch_new_group(), patch_partition_tables():
        started, zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config,
            mpu=mpu,
            dist_init_required=False,
        )
    reject_overflows(zero)
    sum_before_steps(zero, module, groups.tp)
    return kind(module, optimizer, started, zero, groups, device, replica)


def _moved(layer: Layer, device: torch.device, dtype: torch.dtype) -> Layer:
    """The layer on its device as soon as it is built: the host holds one layer in fp32 at most."""
    return dataclasses.replace(layer, build=lambda: layer.build().to(device, dtype))
