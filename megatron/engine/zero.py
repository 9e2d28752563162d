"""One rank has all layers (PP = 1): DeepSpeedEngine runs them as one module, ZeRO 1-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.engine.interface import Engine, Gate, MicroBatches
from megatron.engine.shards import Shards, refresh_weights
from megatron.engine.zero3 import average_over_replicas
from megatron.parallel.groups import SERIAL, Axis, Groups
from megatron.parallel.ulysses import all_positions, own_positions


class ZeroEngine(Engine):
    """DeepSpeed around a module and the optimizer of its parameters."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        deepspeed: Any,
        zero: Any,
        groups: Groups,
        device: torch.device,
        replica: Axis = SERIAL,
    ) -> None:
        """Made by `start_engine`.

        Args:
            module: this rank's part of the model; (tokens, labels) -> loss, (tokens) -> logits.
            optimizer: of its parameters, which DeepSpeed has flattened.
            deepspeed, zero: DeepSpeed's engine, and its optimizer around ours.
            groups: of this rank.
            device: where the model lives.
            replica: MiCS' ranks with equal states.
        """
        self.module, self.optimizer, self.groups, self.device = module, optimizer, groups, device
        self._deepspeed, self._zero = deepspeed, zero
        self._replica = replica
        self._accumulation_steps = int(deepspeed.gradient_accumulation_steps())
        self._total_loss = torch.zeros((), device=device)
        self._answer: bool | None = None  # the gate's, in this step
        if deepspeed.fp16_enabled():  # at the lowest scale an overflow skips the step, no more
            zero.loss_scaler.raise_error_at_min_scale = False

    def train_batch(self, micro_batches: MicroBatches) -> Tensor:
        self.module.train()
        self._answer = None
        self._total_loss = total = torch.zeros((), device=self.device)
        for tokens, labels in self._to_device(micro_batches):
            loss = self._deepspeed(tokens, labels)
            self._deepspeed.backward(loss)
            if self._replica.size > 1 and self._deepspeed.is_gradient_accumulation_boundary():
                average_over_replicas(self._zero, self._replica)
            total += loss.detach().float()
            self._deepspeed.step()  # updates the weights after the last micro-batch only
        return self._mean_loss()

    @torch.no_grad()
    def eval_batch(self, micro_batches: MicroBatches) -> Tensor:
        self.module.eval()
        total = torch.zeros((), device=self.device)
        count = 0
        for tokens, labels in self._to_device(micro_batches):
            total += self._deepspeed(tokens, labels).float()
            count += 1
        self.module.train()
        return self._mean_over_data_parallel(total / count)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        self.module.eval()
        sp, length = self.groups.sp, tokens.shape[1]
        # Equal shards for both kinds of sequence parallelism; causal attention ignores the padding.
        tokens = F.pad(tokens, (0, -length % (sp.size * self.groups.tp.size)))
        output = self._forward(own_positions(tokens.to(self.device), sp))
        self.module.train()
        return None if output is None else all_positions(output, sp)[:, :length]

    def set_accumulation_steps(self, steps: int) -> None:
        engine, self._accumulation_steps = self._deepspeed, steps
        each = engine.train_micro_batch_size_per_gpu() * engine.dp_world_size
        engine.set_train_batch_size(steps * each)
        engine.micro_steps = 0  # DeepSpeed ends a step where this is a multiple of `steps`

    def set_learning_rate(self, rate: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = rate

    def gradient_norm(self) -> Tensor | float:
        norm: Tensor | float = self._deepspeed.get_global_grad_norm()
        return norm

    @property
    def step_applied(self) -> bool:
        return bool(self._deepspeed.was_step_applied()) and self._answer is not False

    @property
    def loss_scale(self) -> float:
        return float(self._zero.loss_scale) if self._deepspeed.fp16_enabled() else 1.0

    @contextmanager
    def unclipped(self) -> Iterator[None]:
        clip, self._zero.clip_grad = self._zero.clip_grad, 0.0
        try:
            yield
        finally:
            self._zero.clip_grad = clip

    @contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        # DeepSpeed calls the optimizer's step once per group, after it has set the norm; where that
        # does nothing, it rebuilds the model's weights from unchanged ones and drops the gradients.
        optimizer: Any = self.optimizer
        step = optimizer.step

        def asked(*args: Any, **kwargs: Any) -> Any:
            if self._answer is None:
                self._answer = gate(self._mean_loss(), self._zero._global_grad_norm)
            return step(*args, **kwargs) if self._answer else None

        optimizer.step = asked
        try:
            yield
        finally:
            del optimizer.step

    def refresh_weights(self) -> None:
        refresh_weights(self._zero)

    def shards(self) -> Shards:
        return Shards(
            self.module,
            self._zero,
            self.optimizer,
            self.groups.tp,
            writes=self._replica.rank == 0,
            scales=self._deepspeed.fp16_enabled(),
        )

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

    def _mean_loss(self) -> Tensor:
        """Of the global batch; a collective over the data-parallel ranks."""
        return self._mean_over_data_parallel(self._total_loss / self._accumulation_steps)

    def _mean_over_data_parallel(self, value: Tensor) -> Tensor:
        """The mean over samples and, as sequences are split evenly, over their positions."""
        dp = self.groups.dp_sp
        if dp.group is not None:
            dist.all_reduce(value, group=dp.group)
            value /= dp.size
        return value
