"""Causal attention of a compiled block on a CPU: torch's forward, a backward of our own.

torch's backward kernel computes in fp32 whatever the type, a quarter of a bf16 step on a CPU with
AMX. Here it is matrix products in the inputs' type over blocks of queries, and between them what
inductor fuses into one pass. Scores are fp32, as in torch's kernel.
Legend: B batch, N query heads, K key/value heads, G = N/K, S sequence, D head width, Q queries of
a block, E = keys up to the block's end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.model.fusion import materialized
from megatron.parallel.linear import multiplies_bf16

QUERIES = 128
LONGEST = 2048
"""Positions: beyond them the blocks of queries would make a graph that takes long to compile."""


def takes(q: Tensor) -> bool:
    """Whether queries (B, N, S, D) are for `causal_attention` below; asked as a graph is traced."""
    return (
        q.device.type == "cpu"
        and q.shape[2] % QUERIES == 0
        and q.shape[2] <= LONGEST
        # Without matrix units for bf16 torch's kernel is faster.
        and (q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and multiplies_bf16()))
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the tokens up to each one's own.

    Args:
        q: (B, N, S, D), bf16 or fp32.
        k: (B, K, S, D); query heads i*N/K .. (i+1)*N/K - 1 read head i.
        v: (B, K, S, D).

    Returns:
        (B, N, S, D).
    """
    y: Tensor = _CausalAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return y


@torch.library.custom_op("megatron::exact_scores", mutates_args=())
def exact_scores(q: Tensor, k: Tensor) -> Tensor:
    """q (R, Q, D), k (R, E, D) -> q k^T (R, Q, E) in fp32, at the rate of their type.

    torch has no product of bf16 matrices into fp32 on a CPU. One of fp32 matrices that are rounded
    to bf16 is that; an operator of its own, as the switch is no part of a graph.
    """
    if q.dtype == torch.float32:
        return torch.bmm(q, k.transpose(1, 2))
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        return torch.bmm(q.float(), k.float().transpose(1, 2))
    finally:
        switch.fp32_precision = before


@exact_scores.register_fake
def _(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float32)


@torch.library.custom_op("megatron::summed_keys", mutates_args=())
def summed_keys(parts: list[Tensor]) -> Tensor:
    """Blocks of (R, E, D), the last of all keys -> their sum (R, S, D), in fp32 until the end."""
    total = parts[-1].to(torch.float32, copy=True)
    for part in parts[:-1]:
        total[:, : part.shape[1]] += part
    return total.to(parts[-1].dtype)


@summed_keys.register_fake
def _(parts: list[Tensor]) -> Tensor:
    return torch.empty_like(parts[-1])


class _CausalAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, lse)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, lse = ctx.saved_tensors
        batch, heads, length, width = q.shape
        rows, group = batch * k.shape[1], heads // k.shape[1]
        scale = 1 / math.sqrt(width)

        def grouped(x: Tensor) -> Tensor:
            return x.reshape(rows, group, length, -1)  # (B*K, G, S, ...)

        means = grouped((grad.float() * y.float()).sum(-1))  # of the scores' gradients, per query
        q, grad, lse = grouped(q), grouped(grad), grouped(lse)
        k, v = k.reshape(rows, length, width), v.reshape(rows, length, width)
        q_grads, k_grads, v_grads = [], [], []
        for first in range(0, length, QUERIES):
            end = first + QUERIES
            own = slice(first, end)
            block = (rows, group, QUERIES, end)
            q_own, grad_own = q[:, :, own].flatten(1, 2), grad[:, :, own].flatten(1, 2)  # G*Q rows
            scores = exact_scores(q_own, k[:, :end]).view(block)
            seen = torch.arange(end) <= torch.arange(first, end)[:, None]
            p = torch.where(seen, torch.exp(scores * scale - lse[:, :, own]), 0.0)
            p_grad = torch.bmm(grad_own, v[:, :end].transpose(1, 2)).view(block)
            s_grad = p * (p_grad.float() - means[:, :, own]) * scale
            p, s_grad = (x.to(q.dtype).flatten(1, 2) for x in (p, s_grad))
            q_grads.append(torch.bmm(s_grad, k[:, :end]).view(rows, group, QUERIES, width))
            k_grads.append(torch.bmm(s_grad.transpose(1, 2), q_own))
            v_grads.append(torch.bmm(p.transpose(1, 2), grad_own))
        kv_shape = (batch, heads // group, length, width)
        q_grad = materialized(torch.cat(q_grads, 2)).view(batch, heads, length, width)
        return q_grad, summed_keys(k_grads).view(kv_shape), summed_keys(v_grads).view(kv_shape)
