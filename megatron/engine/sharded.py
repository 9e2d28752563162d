"""Our own ZeRO 0 to 2 for one stage: gradients are reduced behind the backward pass, each rank
updates its slice of the weights, and the result is gathered behind the next forward pass.

Stages 0 and 1 accumulate micro-batches in full and reduce once a step; stage 2 reduces every
micro-batch and keeps its slice alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.engine_choice import ShardedSettings
from megatron.engine.buckets import Bucket, buckets_of
from megatron.engine.gathering import Gathering
from megatron.engine.interface import Gate, MakeOptimizer, MicroBatches
from megatron.engine.one_stage import OneStageEngine
from megatron.engine.reduction import Reduction, in_backward_order
from megatron.engine.shards import Shards
from megatron.parallel.groups import Groups
from megatron.parallel.partial_gradients import sum_parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ShardedEngine(OneStageEngine):
    """A module with the optimizer of its flat, sharded parameters.

    Args:
        module: this rank's part of the model, on the device and in the type that it computes in:
            (tokens, labels) -> loss, (tokens) -> logits.
        make_optimizer: from the named parameters; its groups get this rank's slices instead.
        groups: of this rank.
        device: where the model lives.
        settings: of this engine.
        gathering: the layers of the module wait for their weights with it.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        groups: Groups,
        device: torch.device,
        settings: ShardedSettings,
        gathering: Gathering,
    ) -> None:
        optimizer = make_optimizer(module.named_parameters())
        super().__init__(module, optimizer, module, groups, device, settings.accumulation_steps)
        dp, buckets = groups.dp_sp, list[Bucket]()
        for group in optimizer.param_groups:
            own = buckets_of(group["params"], dp)
            group["params"] = [bucket.master for bucket in own]
            buckets += own
        self._buckets = in_backward_order(buckets, list(module.parameters()))
        self._reduction = Reduction(
            self._buckets, dp, DTYPES[settings.sent_in], each=settings.reduces_each
        )
        self._gathering, self._clip = gathering, settings.clip_grad
        # Schedule-free rules change the slices between steps.
        self._gathers_behind = "train_mode" not in optimizer.param_groups[0]
        self._norm = self._mean = torch.zeros((), device=device)
        self._gate: Gate | None = None
        self._applied: bool | Tensor = True
        # What GradScaler, too, asks a rule before it leaves scale and verdict to the kernel.
        self._fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._waits = device.type == "cpu" or not self._fused

    def train_batch(self, micro_batches: MicroBatches) -> Tensor:
        if not self.module.training:
            self.module.train()
        steps = self._accumulation_steps
        self._total_loss = total = torch.zeros((), device=self.device)
        # Sums over micro-batches and ranks are means.
        share = torch.full((), 1 / (steps * self.groups.dp_sp.size), device=self.device)
        for number, (tokens, labels) in enumerate(self._to_device(micro_batches)):
            loss: Tensor = self._call(tokens, labels)
            self._reduction.begin(number, steps)
            loss.backward(share.to(loss.dtype))  # type: ignore[no-untyped-call]
            self._reduction.end()
            total += loss.detach().float()
        self._update()
        return self._mean

    def set_accumulation_steps(self, steps: int) -> None:
        self._accumulation_steps = steps

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def gradient_norm(self) -> Tensor | float:
        return self._norm

    @property
    def step_applied(self) -> bool | Tensor:
        return self._applied

    @property
    def loss_scale(self) -> float:
        return 1.0

    @contextmanager
    def unclipped(self) -> Iterator[None]:
        clip, self._clip = self._clip, 0.0
        try:
            yield
        finally:
            self._clip = clip

    @contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        self._gate = gate
        try:
            yield
        finally:
            self._gate = None

    def refresh_weights(self) -> None:
        self._gathering.begin(reversed(self._buckets))
        self._gathering.finish()

    def shards(self) -> Shards:
        self._gathering.finish()
        return Shards(
            self.module,
            self.optimizer,
            self.groups.tp,
            [span for bucket in self._buckets for span in bucket.spans()],
            self.refresh_weights,
        )

    def close(self) -> None:
        self._gathering.finish()
        self._reduction.close()

    @torch.no_grad()
    def _update(self) -> None:
        """Clips and steps, unless the gradient is not finite or the gate refuses; drops it."""
        partial = (bucket for bucket in self._buckets if bucket.kind.partial)
        sum_parts(gradients_of(partial), self.groups.tp)
        self._norm, self._mean = self._totals()
        excess = ((self._norm + 1e-6) / (self._clip or math.inf)).clamp(min=1.0)
        if self._waits or self._gate is not None:
            self._applied = self._step_if_fit(excess)
        else:
            self._applied = finite = self._norm.isfinite()
            self._step(excess, (~finite).float())  # nothing waits
        if self._applied is not False:
            self._gathering.begin(reversed(self._buckets))
            if not self._gathers_behind:
                self._gathering.finish()
        for bucket in self._buckets:
            bucket.master.grad = None

    def _step_if_fit(self, excess: Tensor) -> bool:
        """A step by any rule; waits for the norm. Returns whether it was taken."""
        fit = bool(self._norm.isfinite())
        if fit and self._gate is not None:
            fit = self._gate(self._mean, self._norm)
        if fit:
            self._step(excess if excess > 1 else None)
        return fit

    def _step(self, excess: Tensor | None, found_inf: Tensor | None = None) -> None:
        """A step; a fused rule's kernel divides by `excess`, and reads both on the device."""
        rule: Any = self.optimizer
        if self._fused:
            rule.grad_scale, rule.found_inf = excess, found_inf
        elif excess is not None:
            torch._foreach_mul_(gradients_of(self._buckets), 1 / excess)
        try:
            rule.step()
        finally:
            rule.grad_scale = rule.found_inf = None

    def _totals(self) -> tuple[Tensor, Tensor]:
        """Gradient norm of the whole model, and mean loss of the global batch; a collective of all.

        A replicated weight counts once. One message has both, before that of the weights.
        """
        first = self.groups.tp.rank == 0
        counted = (bucket for bucket in self._buckets if first or bucket.kind.sharded)
        norms = torch._foreach_norm(gradients_of(counted))
        sums = torch.stack([torch.stack(norms).square().sum(), self._total_loss])
        ranks = self.groups.layout.world
        if ranks > 1:
            dist.all_reduce(sums)
        return sums[0].sqrt(), sums[1] / (self._accumulation_steps * ranks)


def gradients_of(buckets: Iterable[Bucket]) -> list[Tensor]:
    """Of the buckets' slices, after their reduction."""
    return [bucket.master.grad for bucket in buckets if bucket.master.grad is not None]
