"""The engine's interface to training: `ShardedEngine`, and DeepSpeed's two behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron.engine.shards import Shards
from megatron.parallel.groups import Groups

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (output of the last layer, labels) -> scalar
MicroBatches = Iterable[tuple[Tensor, Tensor]]  # (tokens, labels), each (B, S)
MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Gate = Callable[[Tensor, Tensor | float], bool]
"""(mean loss of the global batch, gradient norm before clipping) -> whether to update."""


class Engine(Protocol):
    """One step, one evaluation, one learning rate: all that the training loop needs.

    Attributes:
        module: the local part of the model (the whole of it at PP = 1).
        optimizer: the optimizer made by `make_optimizer`, with flat fp32 parameters in it.
        groups: of this rank.
        device: where the model lives.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    groups: Groups
    device: torch.device

    def train_batch(self, micro_batches: MicroBatches) -> Tensor:
        """One optimizer step over `gradient_accumulation_steps` micro-batches.

        Returns:
            The mean loss of the global batch, a scalar on the device, equal on all ranks.
        """

    def eval_batch(self, micro_batches: MicroBatches) -> Tensor:
        """The mean loss of one global batch, without a step; micro-batches as in a step."""

    def logits(self, tokens: Tensor) -> Tensor | None:
        """Logits of the last layer, for sampling; a collective over one replica of the model.

        Args:
            tokens: (B, S) int64, equal on all ranks.

        Returns:
            (B, S, V/tp) on the rank of the last stage (`last_stage`), None on the others.
        """

    def set_accumulation_steps(self, steps: int) -> None:
        """Sets the micro-batches of the steps to come; an evaluation keeps the full batch's."""

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next step in every parameter group."""

    def gradient_norm(self) -> Tensor | float:
        """Norm of the last step's gradient over all ranks before clipping; inf on overflow.

        A tensor on the device where the engine has one: to hand it on does not wait.
        """

    @property
    def step_applied(self) -> bool:
        """Whether the last step changed the weights: its gradient was finite, no gate refused."""

    @property
    def loss_scale(self) -> float:
        """Factor on the fp16 loss; 1 in bf16 and fp32."""

    def unclipped(self) -> AbstractContextManager[None]:
        """Inside it, a step does not clip the gradient."""

    def gated(self, gate: Gate) -> AbstractContextManager[None]:
        """Inside it, each step asks `gate` once, with loss and norm known and nothing changed yet.

        A refused step leaves weights and optimizer states as they are, and its gradients are
        dropped. Every rank asks, so the gate may be a collective and must answer alike on all. It
        is not asked where the gradient is not finite: such a step is never applied.
        """

    def refresh_weights(self) -> None:
        """Rebuilds the model's weights from the optimizer's fp32 ones; a collective."""

    def shards(self) -> Shards:
        """The weights and optimizer states that this rank owns."""

    @property
    def last_stage(self) -> int:
        """Pipeline-axis rank that has the last stage, and so the logits."""

    def pipeline_bubble(self) -> float | None:
        """Fraction of the steps since the last call in which a stage computed nothing.

        A collective over the stages; None without a pipeline, or without a step.
        """

    def close(self) -> None:
        """Removes hooks and frees what DeepSpeed holds; the process groups stay."""
