"""RMSNorm: x / rms(x) * weight, computed in fp32 for any dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.layers import set_tensor_parallel_attributes
from megatron.parallel.mappings import copy_to_tensor_parallel


class _RMSNorm(Function):
    """For the CPU, where torch has no kernel and its composite takes twice the time and memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x * scale).mul_(weight).to(x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        product = grad * wide
        rows = product.reshape(-1, size)
        weight_grad = rows.t() @ scale.reshape(-1)
        # x * scale = y: dy/dx = scale * (1 - y y^T / size)
        along = (rows @ weight.to(scale.dtype)).view_as(scale) * scale.pow(3).div_(-size)
        x_grad = torch.mul(grad, weight, out=product).mul_(scale).addcmul_(wide, along)
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; x (..., size), weight (size,)."""
    if x.is_cpu and not torch.compiler.is_compiling():
        y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    else:
        y = F.rms_norm(x, weight.shape, weight, eps)
    return y


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; the weight is replicated over the tensor-parallel ranks.

    No communication: where the ranks norm different vectors, each has a part of the weight's
    gradient, and the engine sums the parts once per step (`parallel/partial_gradients.py`).
    """

    def __init__(self, size: int, eps: float, tp: Axis = SERIAL) -> None:
        """Builds the weight, all ones.

        Args:
            size: of the last dimension.
            eps: added to the mean square.
            tp: axis whose ranks norm different vectors (positions or heads); SERIAL where all
                norm the same.
        """
        super().__init__()
        self.size = size
        self.eps = eps
        self.tp = tp
        self.summed = SERIAL  # over this axis the backward pass sums the weight's gradient
        self.weight = set_tensor_parallel_attributes(nn.Parameter(torch.ones(size)), (size,), None)
        self.weight.tp_partial_grad = tp.size > 1  # type: ignore[attr-defined]

    def sum_in_backward(self) -> None:
        """For an engine that cannot sum: one all-reduce in each backward pass from now on."""
        self.weight.tp_partial_grad = False  # type: ignore[attr-defined]
        self.summed = self.tp

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> (..., size)."""
        weight: Tensor = self.weight
        if self.summed.size > 1:
            weight = copy_to_tensor_parallel(weight, self.summed)
        return rms_norm(x, weight, self.eps)
