"""One rank has all layers (PP = 1): DeepSpeedEngine runs them as one module, ZeRO 1-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.engine.distributed import ModelParallelUnit, quiet
from megatron.engine.interface import Engine, LossFunction, MakeOptimizer, MicroBatches
from megatron.engine.patches import patch_new_group, patch_partition_tables
from megatron.engine.shards import Shards, refresh_weights
from megatron.engine.zero3 import average_over_replicas
from megatron.parallel.groups import SERIAL, Axis, Groups
from megatron.parallel.ulysses import all_positions, own_positions

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroEngine(Engine):
    """DeepSpeed around a module and the optimizer of its parameters."""

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        make_optimizer: MakeOptimizer,
        groups: Groups,
        device: torch.device,
        deepspeed_config: dict[str, Any],
        mpu: ModelParallelUnit | None = None,
        replica: Axis = SERIAL,
    ) -> None:
        """Starts DeepSpeed on this rank's part of the model; arguments as of `make_engine`.

        `mpu` is None where the module has the groups; `replica` is MiCS' ranks of equal states.
        """
        self.module, self.groups, self.device = module, groups, device
        self._loss, self._replica = loss, replica
        self._accumulation_steps: int = deepspeed_config["gradient_accumulation_steps"]
        self.optimizer = make_optimizer(module.named_parameters())
        with quiet(), patch_new_group(), patch_partition_tables():
            self._deepspeed, self._zero, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=deepspeed_config,
                mpu=mpu,
                dist_init_required=False,
            )

    def train_batch(self, micro_batches: MicroBatches) -> Tensor:
        self.module.train()
        total = torch.zeros((), device=self.device)
        for tokens, labels in self._to_device(micro_batches):
            loss = self._loss(self._deepspeed(tokens), labels)
            self._deepspeed.backward(loss)
            if self._replica.size > 1 and self._deepspeed.is_gradient_accumulation_boundary():
                average_over_replicas(self._zero, self._replica)
            self._deepspeed.step()  # updates the weights after the last micro-batch only
            total += loss.detach().float()
        return self._mean_over_data_parallel(total / self._accumulation_steps)

    @torch.no_grad()
    def eval_batch(self, micro_batches: MicroBatches) -> Tensor:
        self.module.eval()
        total = torch.zeros((), device=self.device)
        count = 0
        for tokens, labels in self._to_device(micro_batches):
            total += self._loss(self._deepspeed(tokens), labels).float()
            count += 1
        self.module.train()
        return self._mean_over_data_parallel(total / count)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        self.module.eval()
        sp, length = self.groups.sp, tokens.shape[1]
        # Equal runs for sequence parallelism of both kinds; causal attention never looks right.
        tokens = F.pad(tokens, (0, -length % (sp.size * self.groups.tp.size)))
        output = self._forward(own_positions(tokens.to(self.device), sp))
        self.module.train()
        return None if output is None else all_positions(output, sp)[:, :length]

    def set_learning_rate(self, rate: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = rate

    def gradient_norm(self) -> Tensor | float:
        norm: Tensor | float = self._deepspeed.get_global_grad_norm()
        return norm

    @property
    def step_applied(self) -> bool:
        return bool(self._deepspeed.was_step_applied())

    @property
    def loss_scale(self) -> float:
        return float(self._zero.loss_scale) if self._deepspeed.fp16_enabled() else 1.0

    def scaler_state(self) -> dict[str, float]:
        if not self._deepspeed.fp16_enabled():
            return {}
        scaler = vars(self._zero.loss_scaler)
        return {key: scaler[key] for key in _SCALER_STATE}

    def load_scaler_state(self, values: dict[str, float]) -> None:
        if values and self._deepspeed.fp16_enabled():
            vars(self._zero.loss_scaler).update(values)

    @contextmanager
    def unclipped(self) -> Iterator[None]:
        clip, self._zero.clip_grad = self._zero.clip_grad, 0.0
        try:
            yield
        finally:
            self._zero.clip_grad = clip

    def refresh_weights(self) -> None:
        refresh_weights(self._zero)

    def shards(self) -> Shards:
        writes = self._replica.rank == 0
        return Shards(self.module, self._zero, self.optimizer, self.groups.tp, writes)

    @property
    def last_stage(self) -> int:
        return 0

    def pipeline_bubble(self) -> float | None:
        return None

    def close(self) -> None:
        if self._deepspeed is not None:
            self._deepspeed.destroy()
        self._deepspeed = self._zero = None

    def _forward(self, tokens: Tensor) -> Tensor | None:
        output: Tensor = self._deepspeed(tokens)
        return output

    def _to_device(self, micro_batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's positions of each micro-batch, on the device."""
        sp, device = self.groups.sp, self.device
        for tokens, labels in micro_batches:
            if sp.size > 1:
                tokens, labels = own_positions(tokens, sp), own_positions(labels, sp)
            yield tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _mean_over_data_parallel(self, value: Tensor) -> Tensor:
        """Of samples and, as a sequence is split evenly, of their positions."""
        dp = self.groups.sequence_data
        if dp.group is not None:
            dist.all_reduce(value, group=dp.group)
        return value / dp.size
