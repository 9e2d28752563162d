"""The two conjugate collectives of tensor parallelism, and the products that need the first.

Each is the identity, or a plain product, on an axis of size one.
Legend: B batch, S sequence.
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

from megatron.parallel.collectives import finished, start_all_reduce
from megatron.parallel.groups import Axis
from megatron.parallel.linear import input_gradient, weight_gradient


def _all_reduced(x: Tensor, tp: Axis) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=tp.group)
    return total


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A clone: autograd may pass the same tensor to another branch.
        return _all_reduced(grad, ctx.tp), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        return _all_reduced(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_tensor_parallel(x: Tensor, tp: Axis) -> Tensor:
    """Forward: the identity, x (...) equal on all ranks. Backward: all-reduce of the gradients."""
    if tp.size == 1:
        return x
    y: Tensor = _Copy.apply(x, tp)  # type: ignore[no-untyped-call]
    return y


def reduce_from_tensor_parallel(x: Tensor, tp: Axis) -> Tensor:
    """Forward: all-reduce (sum) of the ranks' x (...), in place. Backward: the identity.

    Args:
        x: contiguous and the caller's own: what made it does not need it in its backward pass, and
            nobody else reads it. Its values are those of the sum afterwards.
        tp: tensor-parallel axis.
    """
    if tp.size == 1:
        return x
    if torch.compiler.is_compiling():  # the compiler sees by itself that it may write into x
        y: Tensor = _Reduce.apply(x, tp)  # type: ignore[no-untyped-call]
        return y
    # The gradient of x is that of the sum, so autograd need not know of it.
    dist.all_reduce(x.detach(), group=tp.group)
    return x


class _CopiedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.tp = tp
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows = [grad.flatten(0, 1) for grad in grads]  # (BS, out/tp)
        summing = start_all_reduce(input_gradient(rows, weights), ctx.tp)
        inputs = x.flatten(0, 1)  # beside the sum:
        weight_grads = [weight_gradient(row, inputs) for row in rows]
        return finished(summing).view_as(x), None, *weight_grads


def copied_linear(x: Tensor, weights: Sequence[Tensor], tp: Axis) -> tuple[Tensor, ...]:
    """x times this rank's rows of several matrices.

    Forward: no communication. Backward: one all-reduce of x's gradient, beside the products for the
    weights' gradients.

    Args:
        x: (B, S, in), equal on all ranks.
        weights: (out/tp, in) each.
        tp: tensor-parallel axis.

    Returns:
        (B, S, out/tp) for each weight.
    """
    if tp.size == 1:
        return tuple(F.linear(x, weight) for weight in weights)
    y: tuple[Tensor, ...] = _CopiedLinear.apply(x, tp, *weights)  # type: ignore[no-untyped-call]
    return y
