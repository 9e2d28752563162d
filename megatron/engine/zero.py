"""One rank has all layers (PP = 1): DeepSpeedEngine runs them as one module, ZeRO 1-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron.engine.interface import Gate, MicroBatches
from megatron.engine.one_stage import OneStageEngine
from megatron.engine.shards import Shards
from megatron.engine.zero3 import average_over_replicas
from megatron.engine.zero_spans import refresh_weights, zero_spans
from megatron.parallel.groups import SERIAL, Axis, Groups


class ZeroEngine(OneStageEngine):
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
        steps = int(deepspeed.gradient_accumulation_steps())
        super().__init__(module, optimizer, deepspeed, groups, device, steps)
        self._deepspeed, self._zero, self._replica = deepspeed, zero, replica
        self._answer: bool | None = None  # the gate's, in this step
        if deepspeed.fp16_enabled():  # at the lowest scale an overflow skips the step, no more
            zero.loss_scaler.raise_error_at_min_scale = False

    def train_batch(self, micro_batches: MicroBatches) -> Tensor:
        self.module.train()
        self._answer = None
        self._total_loss = total = torch.zeros((), device=self.device)
        for tokens, labels in self._to_device(micro_batches):
            loss: Tensor = self._call(tokens, labels)
            self._deepspeed.backward(loss)
            if self._replica.size > 1 and self._deepspeed.is_gradient_accumulation_boundary():
                average_over_replicas(self._zero, self._replica)
            total += loss.detach().float()
            self._deepspeed.step()  # updates the weights after the last micro-batch only
        return self._mean_loss()

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
            self.optimizer,
            self.groups.tp,
            zero_spans(self._zero),
            self.refresh_weights,
            writes=self._replica.rank == 0,
            scaler=self._zero.loss_scaler if self._deepspeed.fp16_enabled() else None,
        )

    def close(self) -> None:
        if self._deepspeed is not None:
            self._deepspeed.destroy()
        self._call = self._deepspeed = self._zero = None
