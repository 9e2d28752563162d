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

BLOCKS, LEAST_TOKENS = (4, 2), 512
"""Blocks of tokens that a weight's gradient is made of, each of at least so many tokens. More
blocks would take more memory: each makes a gradient."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_bf16() -> bool:
    """Whether this CPU has matrix units for bf16."""
    return bool(torch.cpu._is_amx_tile_supported())


def linear_in_a_graph(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, S, in), weight (out, in) -> x weight^T (B, S, out), as a graph is traced."""
    if _blocks(x, x.shape[:-1].numel()) == 1:
        return F.linear(x, weight)
    y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


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
    blocks = _blocks(x, len(x))
    if blocks == 1:
        return grad.t() @ x
    grad, x = (each.reshape(blocks, -1, each.shape[1]) for each in (grad, x))
    return torch.bmm(grad.transpose(1, 2), x).sum(0)


def _blocks(x: Tensor, tokens: int) -> int:
    """Of a weight's gradient; 1: one product is as fast."""
    in_bf16 = x.device.type == "cpu" and x.dtype == torch.bfloat16
    if not (torch.compiler.is_compiling() and in_bf16 and multiplies_bf16()):
        return 1
    return next((n for n in BLOCKS if tokens % n == 0 and tokens // n >= LEAST_TOKENS), 1)


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
