"""Causal attention with grouped key/value heads, the heads cut over the tensor-parallel axis.

Two kinds of sequence parallelism meet here. Megatron's cuts what comes in and goes out over the
tensor-parallel axis; Ulysses' has cut the sequence itself, and is undone around the attention.
Legend: B batch, S sequence, p = S/sp a piece of it, s = p or, with Megatron's, p/tp; H hidden, N
query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.model.llama_config import LlamaConfig
from megatron.model.recompute import recomputed
from megatron.model.rope import Rope, apply_rope, tables_for
from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_products,
    shard_size,
)
from megatron.parallel.ulysses import heads_to_pieces, pieces_to_heads


def causal_attention(q: Tensor, k: Tensor, v: Tensor, no_flash: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the tokens up to and including each one's own.

    Args:
        q: (B, N, S, D).
        k: (B, K, S, D); query heads i*N/K .. (i+1)*N/K - 1 read head i.
        v: (B, K, S, D).
        no_flash: plain matrix products instead of a fused kernel.

    Returns:
        (B, N, S, D).
    """
    grouped = q.shape[1] != k.shape[1]
    if no_flash:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class Attention(nn.Module):
    """q, k, v column parallel, rotary embedding, attention over this rank's heads, o row parallel.

    One all-reduce in the forward (after o) and one in the backward (before q, k, v); with
    Megatron's sequence parallelism a reduce-scatter and an all-gather instead of each. With
    Ulysses' two all-to-alls each way.
    """

    def __init__(
        self, config: LlamaConfig, rope: Rope | None, tp: Axis, name: str, sp: Axis = SERIAL
    ) -> None:
        """Builds the layers.

        Args:
            config: shape of the model.
            rope: rotary embedding; None for a block without.
            tp: tensor-parallel axis.
            name: this module's, `<block>.attention`.
            sp: sequence-parallel axis (Ulysses).

        Raises:
            ValueError: the key/value heads are not a multiple of TP, or the query heads of TP x SP.
        """
        super().__init__()
        shard_size(config.num_key_value_heads, tp, "NUM_KV_HEAD")
        if config.num_attention_heads % (tp.size * sp.size):
            raise ValueError(
                f"HEADS={config.num_attention_heads} is not a multiple of TP x SP = "
                f"{tp.size} x {sp.size}"
            )
        self.sp = sp
        self.rope = rope
        self.head_dim = config.head_dim
        self.no_flash = config.no_flash_attention
        self.recompute = config.recompute == "selective"
        hidden, std = config.hidden_size, config.weight_std
        kv_size = config.num_key_value_heads * config.head_dim
        shared: dict[str, Any] = {
            "seed": config.seed,
            "sequence_parallel": config.sequence_parallel,
        }

        def column(letter: str, size: int) -> ColumnParallelLinear:
            weight = f"{name}.{letter}.weight"
            return ColumnParallelLinear(hidden, size, tp, name=weight, std=std, **shared)

        self.q = column("q", hidden)
        self.k = column("k", kv_size)
        self.v = column("v", kv_size)
        self.o = RowParallelLinear(
            hidden, hidden, tp, name=f"{name}.o.weight", std=config.residual_std, **shared
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normed residual stream (B, s, H) -> (B, s, H).

        Without Megatron's sequence parallelism both are equal on all tensor-parallel ranks.
        """
        projected = column_products(x, (self.q, self.k, self.v))
        # (B, p, heads/tp * D) -> (B, p, heads/tp, D)
        q, k, v = (y.unflatten(2, (-1, self.head_dim)) for y in projected)
        q, k, v = pieces_to_heads(q, k, v, self.sp)  # (B, S, heads/tp/sp, D)
        if self.recompute:
            return recomputed(self._core, q, k, v)
        return self._core(q, k, v)

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads/tp/sp, S, D)
        if self.rope is not None:
            # All positions are here, whatever the cut of the sequence outside.
            tables = tables_for(self.rope, q)
            q, k = apply_rope(q, tables), apply_rope(k, tables)
        y = causal_attention(q, k, v, self.no_flash)
        y = heads_to_pieces(y.transpose(1, 2), self.sp)  # (B, p, N/tp, D)
        return self.o(y.flatten(2))  # (B, s, H)
