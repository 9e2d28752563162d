"""Sophia-G: Adam's momentum over a clipped diagonal of the Gauss-Newton matrix (Liu et al. 2024).

The diagonal is estimated every few steps from a second gradient, of the loss against labels drawn
from the model's own predictions (Gauss-Newton-Bartlett). No library gives both the estimate and a
rule that runs on ZeRO's flat partitions, so the rule is here; it is elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from megatron.checkpoint.state import RunState
from megatron.data.loader import StepPlan
from megatron.parallel.groups import Axis
from megatron.parallel.head_loss import Targets, TargetsOf

if TYPE_CHECKING:
    from megatron.engine import Engine

_SAMPLED_ELEMENTS = 2**24  # float64 values of the distribution held at a time: 128 MiB


class SophiaG(Optimizer):
    """Sophia with an estimate of the Hessian's diagonal that is made by `hessian_step`.

    Args:
        params: parameters or groups of them, each with "lr" and "weight_decay" (decoupled).
        betas: decay of the momentum and of the diagonal.
        rho: larger clips fewer elements to the sign of the momentum.
        eps: added to the diagonal.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.05,
        eps: float = 1e-15,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.hessian_tokens = 0  # > 0: the next step is an estimate from a gradient over this many

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the weights; inside `hessian_step` the diagonal alone."""
        assert closure is None, "DeepSpeed gives no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["hessian"] = torch.zeros_like(parameter)
                if self.hessian_tokens > 0:
                    _update_hessian(group, parameter.grad, state, self.hessian_tokens)
                else:
                    _update_weight(group, parameter, parameter.grad, state)


def _update_hessian(group: dict[str, Any], grad: Tensor, state: dict[str, Tensor], n: int) -> None:
    _, beta2 = group["betas"]
    state["hessian"].mul_(beta2).addcmul_(grad, grad, value=(1 - beta2) * n)


def _update_weight(
    group: dict[str, Any], parameter: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> None:
    beta1, _ = group["betas"]
    momentum = state["exp_avg"].lerp_(grad, 1 - beta1)
    curvature = state["hessian"].mul(group["rho"]).add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(momentum.div(curvature).clamp_(-1, 1), alpha=group["lr"])


@contextmanager
def hessian_step(optimizer: SophiaG, tokens: int) -> Iterator[None]:
    """Inside it, a step of the engine updates the diagonal and leaves weights and momentum alone.

    The gradient must be that of a loss against sampled labels, and is not to be clipped.

    Args:
        optimizer: the rule.
        tokens: over which the loss of the global batch is averaged.
    """
    optimizer.hessian_tokens = tokens
    try:
        yield
    finally:
        optimizer.hessian_tokens = 0


@dataclass(frozen=True)
class Curvature:
    """Estimates the diagonal before every `interval`-th step, the first one included.

    Attributes:
        engine: with SophiaG as its optimizer.
        plan: which samples a micro-batch holds.
        interval: steps between two estimates.
        seed: of the drawn labels.
        seq_length: S.
    """

    engine: Engine
    plan: StepPlan
    interval: int
    seed: int
    seq_length: int

    def due(self, iteration: int) -> bool:
        """Whether step `iteration` (1-based) is preceded by an estimate."""
        return (iteration - 1) % self.interval == 0

    def estimate(self, state: RunState, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        """Takes the second gradient on the inputs of the step after `state`; weights stay."""
        engine, plan = self.engine, self.plan.at(state.iteration + 1)
        assert isinstance(engine.optimizer, SophiaG)
        drawn = [
            (
                tokens,
                label_draws(
                    self.seed,
                    state.iteration + 1,
                    list(plan.micro_batch(state.consumed_samples, number)),
                    self.seq_length,
                ),
            )
            for number, (tokens, _) in enumerate(micro_batches)
        ]
        tokens_per_step = plan.global_batch_size * self.seq_length
        with engine.unclipped(), hessian_step(engine.optimizer, tokens_per_step):
            engine.train_batch(drawn)


def label_draws(seed: int, iteration: int, samples: list[int], seq_length: int) -> Tensor:
    """One number in [0, 1) per token, to be passed in place of labels.

    A pure function of seed, step, sample and position: no layout changes it.

    Args:
        seed: of the run.
        iteration: of the step whose diagonal is estimated.
        samples: global indices of the B samples.
        seq_length: S.

    Returns:
        (B, S) float64.
    """
    rows = [
        np.random.Generator(
            np.random.Philox(key=[seed, iteration], counter=[0, 0, 0, sample])
        ).random(seq_length)
        for sample in samples
    ]
    return torch.from_numpy(np.stack(rows))


def with_sampled_labels(targets_of: TargetsOf, tp: Axis, vocab_size: int) -> TargetsOf:
    """The targets, with labels drawn from the model's predictions where they are `label_draws`."""
    sample = partial(sample_labels, tp=tp, vocab_size=vocab_size)

    def wrapped(labels: Tensor) -> Targets:
        if not labels.is_floating_point():
            return targets_of(labels)
        unknown = torch.zeros_like(labels, dtype=torch.int64)
        return targets_of(unknown)._replace(labels=labels, sample=sample)

    return wrapped


@torch.no_grad()
def sample_labels(logits: Tensor, draws: Tensor, tp: Axis, vocab_size: int) -> Tensor:
    """Draws one token per position from softmax(logits); collectives over the tensor-parallel axis.

    Args:
        logits: (..., V/tp), this rank's part of the padded vocabulary.
        draws: (...) in [0, 1), equal on all tensor-parallel ranks.
        tp: tensor-parallel axis.
        vocab_size: the vocabulary without padding; no other token is drawn.

    Returns:
        (...) int64, global token ids, equal on all tensor-parallel ranks.
    """
    rows = logits.reshape(-1, logits.shape[-1])  # (BS, V/tp)
    used = min(max(vocab_size - tp.rank * rows.shape[-1], 0), rows.shape[-1])
    at_once = max(1, _SAMPLED_ELEMENTS // rows.shape[-1])
    labels = [
        _sample(part, used, draw, tp)
        for part, draw in zip(
            torch.split(rows, at_once), torch.split(draws.reshape(-1), at_once), strict=True
        )
    ]
    return torch.cat(labels).view(draws.shape)


def _sample(logits: Tensor, used: int, draws: Tensor, tp: Axis) -> Tensor:
    """Inverts the cumulative distribution: the label is the number of tokens below the draw."""
    logits = logits.to(torch.float64, copy=True)
    logits[:, used:] = -torch.inf  # padding of the vocabulary
    highest = logits.amax(dim=-1, keepdim=True)  # (R, 1)
    if tp.group is not None:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp.group)
    cumulative = (logits - highest).exp_().cumsum(dim=-1)  # (R, V/tp)
    totals = cumulative.new_zeros(tp.size, logits.shape[0])
    totals[tp.rank] = cumulative[:, -1]
    if tp.group is not None:
        dist.all_reduce(totals, group=tp.group)
    below = totals[: tp.rank].sum(dim=0)
    wanted = draws.double() * totals.sum(dim=0) - below  # (R,)
    labels = (cumulative <= wanted.unsqueeze(-1)).sum(dim=-1)
    if tp.group is not None:
        dist.all_reduce(labels, group=tp.group)
    return labels
