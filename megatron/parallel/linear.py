"""The products of a linear layer and of its gradients.

Legend: B batch, S sequence, T = B*S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK_TOKENS = 512


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_bf16() -> bool:
    """Whether this CPU has matrix units for bf16."""
    return bool(torch.cpu._is_amx_tile_supported())


def linear_in_a_graph(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, S, in), weight (out, in) -> x weight^T (B, S, out), as a graph is traced."""
    if _in_blocks(x, x.shape[:-1].numel()):
        y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight)


def input_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The gradient (T, in) of what several matrices read: the sum over grad (T, out) @ weight."""
    total = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.addmm_(grad, weight)
    return total


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x (out, in), of outputs' gradients (T, out) and inputs (T, in).

    A CPU's bf16 product of a transposed matrix reaches half the rate of others, and more of it over
    few tokens: there it is one product for each block of tokens, whose sum inductor makes one pass.
    """
    if not _in_blocks(x, len(x)):
        return grad.t() @ x
    blocks = (each.reshape(-1, BLOCK_TOKENS, each.shape[1]) for each in (grad, x))
    return torch.bmm(next(blocks).transpose(1, 2), next(blocks)).sum(0)


def _in_blocks(x: Tensor, tokens: int) -> bool:
    return (
        torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and tokens % BLOCK_TOKENS == 0
        and multiplies_bf16()
    )


class _Linear(Function):
    """F.linear, but for its weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, weight_gradient(grad.flatten(0, -2), x.flatten(0, -2))
