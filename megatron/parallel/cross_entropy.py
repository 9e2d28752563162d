"""Cross entropy of logits whose vocabulary is sharded over ranks: no rank gathers a whole row.

Computed in fp32, a block of tokens at a time. The backward needs the logits in their own dtype and
one number per token, never a softmax.
Legend: B batch, S sequence, T = B*S tokens, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.parallel.groups import Axis
from megatron.parallel.layers import check_token_ids

ELEMENTS_PER_BLOCK = 1 << 24
"""Logits turned into fp32 at once: 64 MiB."""


def _blocks(logits: Tensor) -> Iterator[slice]:
    tokens, columns = logits.shape
    step = max(1, ELEMENTS_PER_BLOCK // columns)
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


def _logsumexp(logits: Tensor, used: int, dtype: torch.dtype) -> Tensor:
    """(T,) log-sum-exp of the `used` first columns of this rank's logits (T, V/tp)."""
    result = torch.full(logits.shape[:1], -torch.inf, dtype=dtype, device=logits.device)
    if used:
        for block in _blocks(logits):
            result[block] = torch.logsumexp(logits[block, :used].to(dtype), dim=-1)
    return result


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp: Axis, vocab_size: int) -> Tensor:
        columns = logits.shape[-1]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        rows = logits.reshape(-1, columns)  # (T, V/tp)
        first = tp.rank * columns
        used = min(max(vocab_size - first, 0), columns)  # the rest are padding: probability 0
        column = labels.reshape(-1) - first  # (T,)
        here = (column >= 0) & (column < used)
        column = column.clamp(0, columns - 1)

        normaliser = _logsumexp(rows, used, dtype)
        target = rows.gather(1, column.unsqueeze(1)).squeeze(1).to(dtype).masked_fill(~here, 0.0)
        if tp.size > 1:
            top = normaliser.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp.group)
            sums = torch.stack([torch.exp(normaliser - top), target])
            dist.all_reduce(sums, group=tp.group)
            normaliser, target = top + sums[0].log(), sums[1]
        ctx.save_for_backward(rows, normaliser, column, here)
        ctx.used = used
        return (normaliser - target).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, normaliser, column, here = ctx.saved_tensors
        token_grad = grad.reshape(-1, 1).to(normaliser.dtype)  # (T, 1)
        result = torch.zeros_like(rows) if ctx.used < rows.shape[1] else torch.empty_like(rows)
        for block in _blocks(rows) if ctx.used else ():
            # d loss / d logit = (softmax - one at the label) * gradient of the token's loss
            part = torch.sub(rows[block, : ctx.used], normaliser[block].unsqueeze(1)).exp_()
            part.mul_(token_grad[block])
            hit = token_grad[block].mul(here[block].unsqueeze(1)).neg_()
            part.scatter_add_(1, column[block].clamp(max=ctx.used - 1).unsqueeze(1), hit)
            result[block, : ctx.used] = part
        return result.view(*grad.shape, -1), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, tp: Axis, vocab_size: int
) -> Tensor:
    """Loss of each token.

    Forward: all-reduce of (B, S) maxima and of (2, B, S) sums. Backward: no communication; each
    rank gets the gradient of its own columns, zero in the padded ones.

    Args:
        logits: (B, S, V/tp), this rank's columns.
        labels: (B, S) integers, equal on all ranks.
        tp: tensor-parallel axis.
        vocab_size: the vocabulary without padding; columns beyond it have probability 0.

    Returns:
        (B, S) fp32 (fp64 for fp64 logits), equal on all ranks.

    Raises:
        ValueError: a label is outside [0, vocab_size), at every TP.
    """
    check_token_ids(labels, vocab_size, "label")
    losses: Tensor = _VocabParallelCrossEntropy.apply(logits, labels, tp, vocab_size)  # type: ignore[no-untyped-call]
    return losses


def mean_vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, tp: Axis, vocab_size: int
) -> Tensor:
    """Mean over the tokens of `vocab_parallel_cross_entropy`: a scalar, equal on all ranks."""
    return vocab_parallel_cross_entropy(logits, labels, tp, vocab_size).mean()
