"""The two conjugate collectives of tensor parallelism.

Each is an autograd function that is the identity on an axis of size one. None writes into its
argument or into a gradient: autograd may pass the same tensor to another branch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron.parallel.groups import Axis


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
        return _all_reduced(grad, ctx.tp), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        return _all_reduced(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _apply(function: type[Function], x: Tensor, tp: Axis) -> Tensor:
    if tp.size == 1:
        return x
    y: Tensor = function.apply(x, tp)  # type: ignore[no-untyped-call]
    return y


def copy_to_tensor_parallel(x: Tensor, tp: Axis) -> Tensor:
    """Forward: the identity, x (...) equal on all ranks. Backward: all-reduce of the gradients."""
    return _apply(_Copy, x, tp)


def reduce_from_tensor_parallel(x: Tensor, tp: Axis) -> Tensor:
    """Forward: all-reduce (sum) of the ranks' x (...). Backward: the identity."""
    return _apply(_Reduce, x, tp)
