"""Megatron's sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): between matrices, a
tensor-parallel rank holds S/tp consecutive positions instead of all of them.

Each all-reduce of tensor parallelism becomes a reduce-scatter and an all-gather, which move the
same bytes. All functions are the identity, or a plain product, on an axis of size one.
Legend: B batch, S sequence, s = S/tp, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.parallel.groups import Axis


def _gathered(x: Tensor, tp: Axis) -> Tensor:
    """(B, s, H) of each rank -> (B, S, H)."""
    x = x.contiguous()
    y = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(y, x, group=tp.group)
    return y.view(tp.size, *x.shape).movedim(0, 1).flatten(1, 2)


def _reduce_scattered(x: Tensor, tp: Axis) -> Tensor:
    """(B, S, H), different on each rank -> own positions (B, s, H) of their sum."""
    assert x.shape[1] % tp.size == 0, f"{x.shape[1]} positions over {tp.size} ranks"
    batch, length, width = x.shape
    shards = x.reshape(batch, tp.size, length // tp.size, width).movedim(1, 0).contiguous()
    y = torch.empty_like(shards[0])  # (B, s, H)
    dist.reduce_scatter_tensor(y, shards.flatten(0, 1), group=tp.group)
    return y


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return _reduce_scattered(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.tp), None


def reduce_scatter_positions(x: Tensor, tp: Axis) -> Tensor:
    """Own positions (B, S/tp, H) of the sum of the ranks' x (B, S, H).

    Forward: reduce-scatter. Backward: all-gather of the gradients.
    """
    if tp.size == 1:
        return x
    y: Tensor = _ReduceScatter.apply(x, tp)  # type: ignore[no-untyped-call]
    return y


class _GatheredLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.tp = tp
        ctx.save_for_backward(x, *weights)
        whole = _gathered(x, tp)
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows = [grad.flatten(0, 1) for grad in grads]  # (BS, out/tp)
        x_grad = rows[0] @ weights[0]
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            x_grad = torch.addmm(x_grad, row, weight)
        own_grad = _reduce_scattered(x_grad.unflatten(0, grads[0].shape[:2]), ctx.tp)
        whole = _gathered(x, ctx.tp).flatten(0, 1)
        return own_grad, None, *(row.t() @ whole for row in rows)


def gathered_linear(x: Tensor, weights: Sequence[Tensor], tp: Axis) -> tuple[Tensor, ...]:
    """All positions times this rank's rows of several matrices.

    The gathered positions are not kept: the backward gathers them again.

    Forward: one all-gather of x. Backward: one all-gather of x, one reduce-scatter of its gradient.

    Args:
        x: own positions (B, S/tp, in).
        weights: (out/tp, in) each.
        tp: tensor-parallel axis.

    Returns:
        (B, S, out/tp) for each weight.
    """
    if tp.size == 1:
        return tuple(F.linear(x, weight) for weight in weights)
    y: tuple[Tensor, ...] = _GatheredLinear.apply(x, tp, *weights)  # type: ignore[no-untyped-call]
    return y
