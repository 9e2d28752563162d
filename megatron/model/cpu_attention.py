"""Causal attention of a compiled block on a CPU: faster than torch's kernels, but bf16's forward.

torch's backward kernel computes in fp32 whatever the type, a quarter of a bf16 step on a CPU with
AMX. Here it is matrix products in the inputs' type over blocks of queries, and between them what
inductor fuses into one pass; so is the forward pass in fp32.
Legend: B batch, N query heads, K key/value heads, G = N/K, R = B*K, S sequence, D head width, Q
queries of a block, E = keys up to the block's end.
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


def with_term(x: Tensor, term: Tensor) -> Tensor:
    """x (..., D) and term (..., 1) -> (..., D + 2), whose product with (y, -1, -1) is x y - term.

    A bf16 product is rounded, and what is left of a score beside its log-sum-exp is small where it
    weighs: so the term goes into the product, in two columns, 16 of its bits.
    """
    # Not by a conversion to bf16 and back, which inductor leaves out.
    upper = (term.view(torch.int32) & -(1 << 16)).view(torch.float32)
    wide: Tensor = torch.cat([x, upper.to(x.dtype), (term - upper).to(x.dtype)], dim=-1)
    return wide


def _mask(queries: int, length: int) -> Tensor:
    """(Q, S) of 0 and -inf for the last block's scores; its last E columns are another's.

    Read, not computed: inductor's comparison of indices takes a third of the time of its pass.
    """
    everywhere = torch.full((queries, length), -math.inf)
    mask: Tensor = materialized(everywhere.triu(length - queries + 1))
    return mask


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result (B, N, S, D) and the log-sum-exp of each query's scores (B, N, S), in fp32."""
    batch, heads, length, width = q.shape
    rows, group = batch * k.shape[1], heads // k.shape[1]
    mask = _mask(QUERIES, length)
    q = q.reshape(rows, group, length, width)
    # Scaled here: as the backward pass' product inductor would keep this one for it.
    k, v = (x.reshape(rows, length, width) for x in (k / math.sqrt(width), v))
    results, sums = [], []
    for end in range(QUERIES, length + 1, QUERIES):
        block = (rows, group, QUERIES, -1)
        q_own = q[:, :, end - QUERIES : end].flatten(1, 2)
        scores = torch.bmm(q_own, k[:, :end].transpose(1, 2)).view(block) + mask[:, length - end :]
        largest = scores.amax(-1, keepdim=True)
        p = torch.exp(scores - largest)
        total = p.sum(-1, keepdim=True)
        results.append(torch.bmm(p.flatten(1, 2), v[:, :end]).view(block) / total)
        sums.append(largest + total.log())
    y = materialized(torch.cat(results, dim=2)).view(batch, heads, length, width)
    return y, torch.cat(sums, dim=2).view(batch, heads, length)


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
        if q.dtype == torch.float32:
            y, lse = _forward(q, k, v)
        else:
            y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, lse = ctx.saved_tensors
        batch, heads, length, width = q.shape
        rows, group = batch * k.shape[1], heads // k.shape[1]
        scale = 1 / math.sqrt(width)

        def grouped(x: Tensor) -> Tensor:
            return x.reshape(rows, group, length, -1)  # (R, G, S, ...)

        means = grouped((grad.float() * y.float()).sum(-1))  # of the scores' gradients, per query
        q, grad, lse = grouped(q), grouped(grad), grouped(lse)
        k, v = k.reshape(rows, length, width), v.reshape(rows, length, width)
        queries = QUERIES
        if q.dtype == torch.bfloat16:
            # Its products gain by size what more masked scores cost.
            queries = 2 * QUERIES if length % (2 * QUERIES) == 0 else QUERIES
            # What is rounded is then log p + half of log S: 0 is between even and one-hot weights.
            middle = math.log(length) / 2
            q, grad = with_term(q, (lse - middle) / scale), with_term(grad, means)
            minus_ones = q.new_full((rows, length, 2), -1.0)
            k, v = (materialized(torch.cat([x, minus_ones], dim=-1)) for x in (k, v))
            lse, means = torch.full_like(lse, middle), torch.zeros_like(means)
        mask = _mask(queries, length)
        q_grads, k_grads, v_grads = [], [], []
        for end in range(queries, length + 1, queries):
            own, seen = slice(end - queries, end), slice(0, end)
            block = (rows, group, queries, -1)
            q_own, grad_own = q[:, :, own].flatten(1, 2), grad[:, :, own].flatten(1, 2)  # G*Q rows
            scores = torch.bmm(q_own, k[:, seen].transpose(1, 2)).view(block).float()
            p = torch.exp(scores * scale - lse[:, :, own] + mask[:, length - end :])
            p_grad = torch.bmm(grad_own, v[:, seen].transpose(1, 2)).view(block).float()
            s_grad = p * (p_grad - means[:, :, own]) * scale
            p, s_grad = (x.to(q.dtype).flatten(1, 2) for x in (p, s_grad))
            q_own, grad_own = q_own[..., :width], grad_own[..., :width]
            q_grads.append(torch.bmm(s_grad, k[:, seen, :width]).view(block))
            k_grads.append(torch.bmm(s_grad.transpose(1, 2), q_own))
            v_grads.append(torch.bmm(p.transpose(1, 2), grad_own))
        kv_shape = (batch, heads // group, length, width)
        q_grad = materialized(torch.cat(q_grads, 2)).view(batch, heads, length, width)
        return q_grad, summed_keys(k_grads).view(kv_shape), summed_keys(v_grads).view(kv_shape)
