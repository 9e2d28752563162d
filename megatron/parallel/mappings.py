"""The four conjugate collectives of tensor parallelism.

Each is an autograd function that is the identity on an axis of size one. None of them writes into
its argument or into a gradient it was given: autograd may hand the same tensor to a neighbouring
branch.
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


def _all_gathered(x: Tensor, tp: Axis) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(tp.size)]
    dist.all_gather(parts, x, group=tp.group)
    return torch.cat(parts, dim=-1)


def _own_slice(x: Tensor, tp: Axis) -> Tensor:
    assert x.shape[-1] % tp.size == 0, f"last dimension {x.shape[-1]} over {tp.size} ranks"
    return x.chunk(tp.size, dim=-1)[tp.rank].contiguous()


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


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return _all_gathered(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _own_slice(grad, ctx.tp), None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return _own_slice(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gathered(grad, ctx.tp), None


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


def gather_from_tensor_parallel(x: Tensor, tp: Axis) -> Tensor:
    """Forward: the ranks' x (..., D/tp) side by side. Backward: own slice of the gradient."""
    return _apply(_Gather, x, tp)


def scatter_to_tensor_parallel(x: Tensor, tp: Axis) -> Tensor:
    """Forward: own slice (..., D/tp) of x (..., D). Backward: all-gather of the gradients."""
    return _apply(_Scatter, x, tp)
