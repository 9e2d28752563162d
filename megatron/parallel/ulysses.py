"""Ulysses' sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509): a rank holds a shard of
each sequence, but in the attention some heads over the whole sequence.

One all-to-all exchanges the first for the second, another reverses it. In between a rank has all
positions in order, so masks and rotary positions are those of one rank.
Legend: B batch, S sequence, s = S/sp, N query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron.parallel.groups import Axis


def own_positions(x: Tensor, sp: Axis) -> Tensor:
    """This rank's S/sp consecutive positions of tokens or labels (B, S)."""
    assert x.shape[1] % sp.size == 0, f"{x.shape[1]} positions over {sp.size} ranks"
    return x.chunk(sp.size, dim=1)[sp.rank]


@torch.no_grad()
def all_positions(x: Tensor, sp: Axis) -> Tensor:
    """The ranks' x (B, S/sp, ...) in order, (B, S, ...) on all of them; has no gradient."""
    if sp.size == 1:
        return x
    x = x.contiguous()
    shards = [torch.empty_like(x) for _ in range(sp.size)]
    dist.all_gather(shards, x, group=sp.group)
    return torch.cat(shards, dim=1)


def seq_to_head_all_to_all(
    q: Tensor, k: Tensor, v: Tensor, sp: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """From some positions of all heads to all positions of some heads.

    A rank gets the key/value heads that its query heads read. Where there are fewer than ranks, a
    head is replicated; its gradient is the sum over the replicas.

    Forward: one all-to-all of q, k and v together. Backward: the reverse one.

    Args:
        q: (B, s, N, D), N a multiple of the ranks.
        k: (B, s, K, D); query heads i*N/K .. (i+1)*N/K - 1 read head i.
        v: (B, s, K, D).
        sp: sequence-parallel axis.

    Returns:
        (B, S, N/sp, D), and twice (B, S, max(1, K/sp), D) where one of K and sp divides the other.
    """
    if sp.size == 1:
        return q, k, v
    assert q.shape[2] % sp.size == 0, f"{q.shape[2]} query heads over {sp.size} ranks"
    replicas = sp.size // math.gcd(k.shape[2], sp.size)
    if replicas > 1:
        k, v = k.repeat_interleave(replicas, dim=2), v.repeat_interleave(replicas, dim=2)
    # (B, s, sp, heads/sp, D) -> (sp, B, s, heads/sp, D): the first index is where it goes.
    batch, length, _, width = q.shape
    shards = [x.reshape(batch, length, sp.size, -1, width).movedim(2, 0) for x in (q, k, v)]
    received = _all_to_all(torch.cat(shards, dim=3), sp)  # the first index: whose positions
    whole = received.movedim(0, 1).flatten(1, 2)  # (B, S, heads/sp, D)
    q, k, v = torch.split(whole, [shard.shape[3] for shard in shards], dim=2)
    return q, k, v


def head_to_seq_all_to_all(x: Tensor, sp: Axis) -> Tensor:
    """The attention's output (B, S, N/sp, D) back to own positions (B, s, N, D).

    Forward: one all-to-all. Backward: the reverse one.
    """
    if sp.size == 1:
        return x
    batch, length, heads, width = x.shape
    shards = x.reshape(batch, sp.size, length // sp.size, heads, width).movedim(1, 0)
    received = _all_to_all(shards, sp)  # (sp, B, s, N/sp, D), the first index: whose heads
    return received.movedim(0, 2).flatten(2, 3)


class _AllToAll(Function):
    """x[i] goes to rank i, y[i] comes from rank i; so the gradient of y[i] goes to rank i too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sp: Axis) -> Tensor:
        ctx.sp = sp
        return _exchanged(x, sp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.sp), None


def _exchanged(x: Tensor, sp: Axis) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    dist.all_to_all_single(y, x, group=sp.group)
    return y


def _all_to_all(x: Tensor, sp: Axis) -> Tensor:
    y: Tensor = _AllToAll.apply(x, sp)  # type: ignore[no-untyped-call]
    return y
