"""Causal attention with grouped key/value heads, the heads sharded over the tensor-parallel axis.

Two kinds of sequence parallelism meet here. Megatron's shards the input and the output over the
tensor-parallel axis. Ulysses' shards the sequence itself, except inside the attention.
Legend: B batch, S sequence, p = S/sp, s = p or, with Megatron's, p/tp; H hidden, N query heads, K
key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.config.shape import ModelShape
from megatron.model import cpu_attention
from megatron.model.layer import ModelContext, recomputed
from megatron.model.rope import Rope, apply_rope, tables_for
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linears,
    shard_size,
)
from megatron.parallel.ulysses import head_to_seq_all_to_all, seq_to_head_all_to_all


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, kernels: Sequence[SDPBackend], expand_kv: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the tokens up to and including each one's own.

    Args:
        q: (B, N, S, D).
        k: (B, K, S, D); query heads i*N/K .. (i+1)*N/K - 1 read head i.
        v: (B, K, S, D).
        kernels: torch's, the first of them that takes these heads; none: torch chooses.
        expand_kv: copy k and v for each query head, where no fused kernel takes grouped heads.

    Returns:
        (B, N, S, D).
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and expand_kv:
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        grouped = False
    if torch.compiler.is_compiling() and not kernels and cpu_attention.takes(q):
        return cpu_attention.causal_attention(q, k, v)
    if kernels:
        with sdpa_kernel(list(kernels), set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class Attention(nn.Module):
    """q, k, v column parallel, rotary embedding, attention over this rank's heads, o row parallel.

    One all-reduce in the forward (after o) and one in the backward (before q, k, v); with
    Megatron's sequence parallelism a reduce-scatter and an all-gather instead of each. With
    Ulysses' two all-to-alls each way.
    """

    column, row = ColumnParallelLinear, RowParallelLinear
    project = staticmethod(column_parallel_linears)  # x (B, s, H) through q, k and v

    def __init__(
        self,
        shape: ModelShape,
        context: ModelContext,
        name: str,
        rope: Rope | None,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        """Builds the layers.

        Args:
            shape: of the model.
            context: how to compute.
            name: this module's, `<block>.attention`.
            rope: rotary embedding; None for a block without.
            qk_norm: number of heads -> norm of queries or keys (B, p, heads/tp, D), before the
                rotary embedding; None: no norms.

        Raises:
            ValueError: the key/value heads are not a multiple of TP, or the query heads of TP x SP.
        """
        super().__init__()
        heads, tp, sp = shape.num_attention_heads, context.tp, context.sp
        shard_size(shape.num_key_value_heads, tp, "NUM_KV_HEAD")
        if heads % (tp.size * sp.size):
            raise ValueError(f"HEADS={heads} is not a multiple of TP x SP = {tp.size} x {sp.size}")
        self.sp = sp
        self.rope = rope
        self.head_width = shape.head_width
        self.tables_for = tables_for  # `document_mask.py` sets its own, and its `attend`
        self.attend: Callable[..., Tensor] = partial(
            causal_attention, kernels=context.attention_kernels, expand_kv=context.expand_kv
        )
        self.recompute = context.recompute == "selective"
        q, kv, options = shape.query_size, shape.key_value_size, context.linear_options

        def column(letter: str, size: int) -> ColumnParallelLinear:
            weight, std = f"{name}.{letter}.weight", shape.weight_std
            return self.column(shape.hidden_size, size, name=weight, std=std, **options)

        self.q, self.k, self.v = column("q", q), column("k", kv), column("v", kv)
        self.o = self.row(
            q, shape.hidden_size, name=f"{name}.o.weight", std=shape.residual_std, **options
        )
        self.q_norm = qk_norm(heads) if qk_norm else None
        self.k_norm = qk_norm(shape.num_key_value_heads) if qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Normed residual stream (B, s, H) -> (B, s, H).

        Without Megatron's sequence parallelism both are equal on all tensor-parallel ranks.
        """
        projected = self.project(x, (self.q, self.k, self.v))
        # (B, p, heads/tp * D) -> (B, p, heads/tp, D)
        q, k, v = (y.view(*y.shape[:2], -1, self.head_width) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.sp.size > 1:
            q, k, v = seq_to_head_all_to_all(q, k, v, self.sp)  # (B, S, heads/tp/sp, D)
        if self.recompute:
            return recomputed(self._core, q, k, v)
        return self._core(q, k, v)

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads/tp/sp, S, D)
        if self.rope is not None:
            # Every rank has all positions here, also with sequence parallelism.
            tables = self.tables_for(self.rope, q)
            q, k = apply_rope(q, tables), apply_rope(k, tables)
        y = self.attend(q, k, v).transpose(1, 2)
        if self.sp.size > 1:
            y = head_to_seq_all_to_all(y, self.sp)  # (B, p, N/tp, D)
        x: Tensor = self.o(y.flatten(2))  # (B, s, H)
        return x
