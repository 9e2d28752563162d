"""The layers are divided into stages (PP > 1): DeepSpeed's PipelineEngine runs them, ZeRO 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import Tensor

from megatron.engine.bubble import StageClock
from megatron.engine.interface import MicroBatches
from megatron.engine.older import scale_in_the_loss
from megatron.engine.patches import patch_global_grad_norm, reduce_tied_gradients, replaced
from megatron.engine.pipeline_module import Stages
from megatron.engine.zero import ZeroEngine
from megatron.parallel.groups import Axis


class PipelineEngine(ZeroEngine):
    """ZeRO-1 around this rank's stages; DeepSpeed's schedule runs the micro-batches of a step."""

    module: Stages

    def __init__(self, module: Stages, *args: Any) -> None:
        """Args: those of `ZeroEngine`."""
        super().__init__(module, *args)
        self._full_steps = self._accumulation_steps
        self._clock = StageClock(self.device, self.groups.pp)
        patch_global_grad_norm(self._zero, self.device)
        scale_in_the_loss(self._deepspeed)
        table = self._deepspeed._INSTRUCTION_MAP
        self._deepspeed._INSTRUCTION_MAP = {
            **table,
            schedule.ForwardPass: self._clock.timed(table[schedule.ForwardPass]),
            schedule.BackwardPass: self._clock.timed(table[schedule.BackwardPass]),
            schedule.ReduceTiedGrads: reduce_tied_gradients,
        }

    def train_batch(self, micro_batches: MicroBatches) -> Tensor:
        self._answer = None
        with self._clock:
            loss: Tensor = self._deepspeed.train_batch(iter(self._to_device(micro_batches)))
        return loss.detach().float()

    @torch.no_grad()
    def eval_batch(self, micro_batches: MicroBatches) -> Tensor:
        engine = self._deepspeed
        with replaced(engine, "micro_batches", self._full_steps):
            loss: Tensor = engine.eval_batch(iter(self._to_device(micro_batches)))
        self.module.train()
        return loss.detach().float()

    @property
    def last_stage(self) -> int:
        return stage_order(self.groups.pp.size, self.module.num_stages_per_rank)[-1][0]

    def pipeline_bubble(self) -> float | None:
        return self._clock.bubble()

    def _mean_loss(self) -> Tensor:
        """Of the global batch; a collective over the pipeline and the data-parallel ranks."""
        loss: Tensor = self._deepspeed._aggregate_total_loss()
        return loss.detach().float()

    def _forward(self, tokens: Tensor) -> Tensor | None:
        return relay(self.module, self.groups.pp, tokens)


def stage_order(ranks: int, num_stages_per_rank: int) -> list[tuple[int, int]]:
    """(pp rank, local stage) in execution order; DualPipeV goes back through the ranks."""
    order = [(place, 0) for place in range(ranks)]
    return order if num_stages_per_rank == 1 else order + [(p, 1) for p in reversed(range(ranks))]


def relay(module: Stages, pp: Axis, tokens: Tensor) -> Tensor | None:
    """Forward through the stages by plain sends, for inputs of any length.

    PipelineEngine fixes the shape of its sends. A collective over the pipeline.

    Args:
        module: this rank's stages.
        pp: pipeline axis.
        tokens: (B, S) int64, equal on all ranks.

    Returns:
        Logits (B, S, V/tp) on the rank of the last stage, None on the others.
    """
    order = stage_order(pp.size, module.num_stages_per_rank)
    hidden = tokens
    for number, (place, stage) in enumerate(order):
        if place != pp.rank:
            continue
        before = order[number - 1][0] if number else place
        if before != place:
            hidden = _receive(pp.ranks[before], next(module.parameters()).dtype, tokens.device)
        module.activate_stage(stage)
        hidden = module(hidden)
        after = order[number + 1][0] if number + 1 < len(order) else place
        if after != place:
            _send(hidden, pp.ranks[after])
    return module.head(hidden) if pp.rank == order[-1][0] else None


def _send(value: Tensor, rank: int) -> None:
    dist.send(torch.tensor(value.shape, device=value.device), dst=rank)
    dist.send(value.contiguous(), dst=rank)


def _receive(rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (B, S, H) tensor of any lengths."""
    shape = torch.empty(3, dtype=torch.int64, device=device)
    dist.recv(shape, src=rank)
    value = torch.empty(shape.tolist(), dtype=dtype, device=device)
    dist.recv(value, src=rank)
    return value
