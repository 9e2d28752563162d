"""What engines share that run all layers on one rank: evaluation, logits, means over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.engine.interface import Engine, LossFunction, MicroBatches
from megatron.parallel.groups import Groups
from megatron.parallel.ulysses import all_positions, own_positions


class OneStageEngine(Engine):
    """The forward passes of a module on this rank's positions.

    Args:
        module: this rank's part of the model.
        optimizer: of its parameters.
        loss: of the last layer's output.
        groups: of this rank.
        device: where the model lives.
        accumulation_steps: micro-batches of a step.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: LossFunction,
        groups: Groups,
        device: torch.device,
        accumulation_steps: int,
    ) -> None:
        self.module, self.optimizer, self.groups, self.device = module, optimizer, groups, device
        self._loss, self._accumulation_steps = loss, accumulation_steps
        self._total_loss = torch.zeros((), device=device)

    @torch.no_grad()
    def eval_batch(self, micro_batches: MicroBatches) -> Tensor:
        self.module.eval()
        total = torch.zeros((), device=self.device)
        count = 0
        for tokens, labels in self._to_device(micro_batches):
            total += self._loss(self._outputs(tokens), labels).float()
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

    @property
    def last_stage(self) -> int:
        return 0

    def pipeline_bubble(self) -> float | None:
        return None

    def _outputs(self, tokens: Tensor) -> Tensor:
        """The last layer's output for this rank's tokens."""
        output: Tensor = self.module(tokens)
        return output

    def _forward(self, tokens: Tensor) -> Tensor | None:
        return self._outputs(tokens)

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
