"""Llama 2/3 and SmolLM2/3 as a list of layers: embedding, blocks, final norm, head.

SmolLM2 is Llama with tied embeddings; SmolLM3 leaves the rotary embedding out of every fourth
block.
Legend: B batch, S sequence (with Ulysses' sequence parallelism a rank's piece of it), s = S or,
with Megatron's, S/tp; H hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from megatron.model.attention import Attention
from megatron.model.layer import Layer, layer_name
from megatron.model.llama_config import LlamaConfig
from megatron.model.mlp import MLP
from megatron.model.norm import RMSNorm
from megatron.model.recompute import recomputed
from megatron.model.rope import Rope
from megatron.parallel.cross_entropy import mean_vocab_parallel_cross_entropy
from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding, column_product

__all__ = [
    "Block",
    "Embedding",
    "FinalNorm",
    "Head",
    "Layer",
    "LlamaConfig",
    "llama_layers",
    "loss_function",
]

TIED_KEY = "embedding"


class Embedding(VocabParallelEmbedding):
    """Tokens to vectors; where embeddings are tied, the same matrix turns vectors into logits."""

    def __init__(self, config: LlamaConfig, tp: Axis, name: str) -> None:
        super().__init__(
            config.vocab_size,
            config.padded_vocab_size,
            config.hidden_size,
            tp,
            seed=config.seed,
            name=f"{name}.weight",
            std=config.weight_std,
            sequence_parallel=config.sequence_parallel,
        )

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        """Tokens (B, S) -> (B, s, H); as the head (B, s, H) -> this rank's logits (B, S, V/tp)."""
        if as_head:
            return column_product(x, self.weight, self.tp, self.sequence_parallel)
        return super().forward(x)


def tied_head(embedding: nn.Module, hidden: Tensor) -> Tensor:
    """The head of tied embeddings; calls the module, so that ZeRO-3's hooks gather the weight."""
    return embedding(hidden, as_head=True)


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(that)): (B, s, H) -> (B, s, H)."""

    def __init__(self, config: LlamaConfig, tp: Axis, sp: Axis, block: int, name: str) -> None:
        """Args: block is its number from 0; name is this module's in the list of layers."""
        super().__init__()
        cut = _positions_cut(config, tp)
        self.recompute = config.recompute == "full"
        rope = Rope(config.head_dim, config.rope_theta, config.rope_scaling)
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, cut)
        self.attention = Attention(
            config, rope if config.has_rope(block) else None, tp, f"{name}.attention", sp
        )
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, cut)
        self.mlp = MLP(config, tp, f"{name}.mlp")

    def forward(self, x: Tensor) -> Tensor:
        """x (B, s, H) -> (B, s, H)."""
        return recomputed(self._forward, x) if self.recompute else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        return x + self.mlp(self.post_attention_norm(x))


class FinalNorm(RMSNorm):
    """The norm before the head."""

    def __init__(self, config: LlamaConfig, tp: Axis) -> None:
        super().__init__(config.hidden_size, config.rms_norm_eps, _positions_cut(config, tp))


def _positions_cut(config: LlamaConfig, tp: Axis) -> Axis:
    """The axis that cuts the positions which a norm sees."""
    return tp if config.sequence_parallel else SERIAL


class Head(ColumnParallelLinear):
    """Hidden (B, s, H) -> this rank's logits (B, S, V/tp), those of the padding included."""

    def __init__(self, config: LlamaConfig, tp: Axis, name: str) -> None:
        super().__init__(
            config.hidden_size,
            config.padded_vocab_size,
            tp,
            seed=config.seed,
            name=f"{name}.weight",
            std=config.weight_std,
            used_rows=config.vocab_size,
            sequence_parallel=config.sequence_parallel,
        )


def llama_layers(config: LlamaConfig, tp: Axis, sp: Axis = SERIAL) -> list[Layer]:
    """The model: tokens (B, S) int64 in, this rank's logits (B, S, V/tp) out.

    Args:
        config: shape of the model.
        tp: tensor-parallel axis.
        sp: sequence-parallel axis (Ulysses); B and S are then those of this rank's piece.
    """
    last = config.num_layers + 2
    tied_key = TIED_KEY if config.tie_embeddings else None
    name = layer_name(0, tied_key)
    embedding = Layer(name, Embedding, partial(Embedding, config, tp, name), tied_key)
    blocks = [
        Layer(
            layer_name(i + 1),
            Block,
            partial(Block, config, tp, sp, i, layer_name(i + 1)),
            recompute=True,
        )
        for i in range(config.num_layers)
    ]
    final_norm = Layer(layer_name(last - 1), FinalNorm, partial(FinalNorm, config, tp))
    if config.tie_embeddings:
        head = Layer(name, Embedding, embedding.build, tied_key, forward=tied_head)
    else:
        head = Layer(layer_name(last), Head, partial(Head, config, tp, layer_name(last)))
    return [embedding, *blocks, final_norm, head]


def loss_function(config: LlamaConfig, tp: Axis) -> Callable[[Tensor, Tensor], Tensor]:
    """loss(logits (B, S, V/tp), labels (B, S)) -> mean over tokens, equal on all ranks."""
    return partial(mean_vocab_parallel_cross_entropy, tp=tp, vocab_size=config.vocab_size)
