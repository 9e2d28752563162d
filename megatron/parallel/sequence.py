"""Megatron's sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): between matrices, a
tensor-parallel rank holds S/tp consecutive positions instead of all of them.

Each all-reduce of tensor parallelism becomes a reduce-scatter and an all-gather, which move the
same bytes. All functions are the identity, or a plain product, on an axis of size one.
Legend: B batch, S sequence, s = S/tp, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.parallel.collectives import (
    Pending,
    finished,
    start_all_gather,
    start_reduce_scatter,
)
from megatron.parallel.groups import Axis
from megatron.parallel.linear import input_gradient, weight_gradient


def _in_order(gathered: Tensor, tp: Axis) -> Tensor:
    """(tp * B, s, H), rank by rank -> (B, S, H); a copy only where B > 1."""
    return gathered.view(tp.size, -1, *gathered.shape[1:]).movedim(0, 1).flatten(1, 2)


def _start_reduce_scatter(x: Tensor, tp: Axis) -> Pending:
    """(B, S, H), different on each rank -> own positions (B, s, H) of their sum.

    Copies x only where B > 1.
    """
    assert x.shape[1] % tp.size == 0, f"{x.shape[1]} positions over {tp.size} ranks"
    shards = x.reshape(len(x), tp.size, -1, x.shape[2]).movedim(1, 0)  # (tp, B, s, H)
    return start_reduce_scatter(shards.flatten(0, 1), tp)


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return finished(_start_reduce_scatter(x, tp))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _in_order(finished(start_all_gather(grad, ctx.tp)), ctx.tp), None


def reduce_scatter_positions(x: Tensor, tp: Axis) -> Tensor:
    """Own positions (B, S/tp, H) of the sum of the ranks' x (B, S, H).

    Forward: reduce-scatter. Backward: all-gather of the gradients.
    """
    if tp.size == 1:
        return x
    y: Tensor = _ReduceScatter.apply(x, tp)  # type: ignore[no-untyped-call]
    return y


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return _in_order(finished(start_all_gather(x, tp)), tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return finished(_start_reduce_scatter(grad, ctx.tp)), None


def all_gather_positions(x: Tensor, tp: Axis) -> Tensor:
    """Own positions (B, S/tp, H) -> those of all ranks (B, S, H).

    Forward: all-gather. Backward: reduce-scatter of the gradients.
    """
    if tp.size == 1:
        return x
    y: Tensor = _AllGather.apply(x, tp)  # type: ignore[no-untyped-call]
    return y


class _GatheredLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.tp = tp
        ctx.save_for_backward(x, *weights)
        whole = _in_order(finished(start_all_gather(x, tp)), tp)
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        tp, batch = ctx.tp, len(x)
        gathering = start_all_gather(x, tp)  # beside the product for x's gradient
        rows = [grad.flatten(0, 1) for grad in grads]  # (BS, out/tp)
        x_grad = input_gradient(rows, weights).view(batch, -1, x.shape[2])
        whole = _in_order(finished(gathering), tp).flatten(0, 1)
        scattering = _start_reduce_scatter(x_grad, tp)  # beside those for the weights'
        weight_grads = [weight_gradient(row, whole) for row in rows]
        return finished(scattering), None, *weight_grads


def gathered_linear(x: Tensor, weights: Sequence[Tensor], tp: Axis) -> tuple[Tensor, ...]:
    """All positions times this rank's rows of several matrices.

    The gathered positions are not kept: the backward gathers them again.

    Forward: one all-gather of x. Backward: one all-gather of x, beside the product for its
    gradient; one reduce-scatter of that, beside the products for the weights' gradients.

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
