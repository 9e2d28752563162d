"""The parts of a decoder-only transformer, and their list: embedding, blocks, final norm, head.

Legend: B batch, S sequence (with Ulysses' sequence parallelism a rank's shard of it), s = S or,
with Megatron's, S/tp; H hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from megatron.config.shape import ModelShape
from megatron.model.attention import Attention
from megatron.model.layer import Layer, ModelContext, recomputed
from megatron.model.mlp import MLP
from megatron.model.norm import RMSNorm
from megatron.model.rope import Rope
from megatron.parallel.head_loss import Targets, head_loss
from megatron.parallel.layers import (
    VocabParallelEmbedding,
    column_parallel_linear,
    sharded_weight,
)

TIED_KEY = "embedding"


class Embedding(VocabParallelEmbedding):
    """Tokens to vectors; where embeddings are tied, the same matrix turns vectors into logits."""

    def __init__(self, shape: ModelShape, context: ModelContext, name: str) -> None:
        super().__init__(
            shape.vocab_size,
            shape.padded_vocab_size(context.tp.size),
            shape.hidden_size,
            name=f"{name}.weight",
            std=shape.embedding_std,
            **context.linear_options,
        )

    def forward(self, x: Tensor, as_head: bool = False, targets: Targets | None = None) -> Tensor:
        """Tokens (B, S) -> (B, s, H); as the head what `head_output` gives for (B, s, H)."""
        return head_output(self, x, targets) if as_head else super().forward(x)


def tied_head(embedding: nn.Module, hidden: Tensor, targets: Targets | None = None) -> Tensor:
    """The head of tied embeddings; calls the module, so that ZeRO-3's hooks gather the weight."""
    output: Tensor = embedding(hidden, as_head=True, targets=targets)
    return output


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(that)): (B, s, H) -> (B, s, H)."""

    def __init__(
        self,
        shape: ModelShape,
        context: ModelContext,
        block: int,
        name: str,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        """Builds attention, MLP and their norms.

        Args:
            shape: of the model.
            context: how to compute.
            block: its number from 0.
            name: this module's in the list of layers.
            qk_norm: as `Attention` takes it.
        """
        super().__init__()
        self.recompute = context.recompute == "full"
        rope = Rope(shape.head_width, shape.rope_theta, shape.rope_scaling_factors)
        self.input_norm: nn.Module = residual_norm(shape, context)
        self.attention = Attention(
            shape, context, f"{name}.attention", rope if shape.has_rope(block) else None, qk_norm
        )
        self.post_attention_norm: nn.Module = residual_norm(shape, context)
        self.mlp: nn.Module = MLP(shape, context, f"{name}.mlp")

    def forward(self, x: Tensor) -> Tensor:
        """x (B, s, H) -> (B, s, H)."""
        return recomputed(self._forward, x) if self.recompute else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        y: Tensor = self.mlp(self.post_attention_norm(x))
        return x + y


class PostNormBlock(Block):
    """x + norm(attention(x)), then + norm(mlp(that)): (B, s, H) -> (B, s, H)."""

    def __init__(self, shape: ModelShape, context: ModelContext, *more: Any) -> None:
        super().__init__(shape, context, *more)
        del self.input_norm  # nothing is normed before the attention
        self.post_mlp_norm = residual_norm(shape, context)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.post_attention_norm(self.attention(x))
        y: Tensor = self.post_mlp_norm(self.mlp(x))
        return x + y


class Head(nn.Module):
    """The last layer of embeddings that are not tied; computes `head_output`."""

    def __init__(self, shape: ModelShape, context: ModelContext, name: str) -> None:
        super().__init__()
        self.vocab_size, self.tp = shape.vocab_size, context.tp
        self.sequence_parallel = context.sequence_parallel
        self.weight = sharded_weight(
            (shape.padded_vocab_size(self.tp.size), shape.hidden_size),
            0,
            self.tp,
            seed=context.seed,
            name=f"{name}.weight",
            std=shape.weight_std,
            used_rows=shape.vocab_size,
        )

    def forward(self, hidden: Tensor, targets: Targets | None = None) -> Tensor:
        """What `head_output` gives."""
        return head_output(self, hidden, targets)


def head_output(head: Head | Embedding, hidden: Tensor, targets: Targets | None) -> Tensor:
    """Hidden (B, s, H) -> the loss against `targets`, a scalar, which makes no logits to keep.

    Without targets: this rank's logits (B, S, V/tp), those of the padding included.
    """
    if targets is None:
        return column_parallel_linear(hidden, head.weight, head.tp, head.sequence_parallel)
    return head_loss(hidden, head.weight, targets, head.tp, head.vocab_size, head.sequence_parallel)


def residual_norm(shape: ModelShape, context: ModelContext) -> RMSNorm:
    """A norm of the residual stream (B, s, H)."""
    return RMSNorm(shape.hidden_size, shape.rms_norm_eps, context.residual_axis)


def decoder_layers(
    shape: ModelShape,
    context: ModelContext,
    block: type[Block] = Block,
    qk_norm: Callable[[int], nn.Module] | None = None,
) -> list[Layer]:
    """The model: tokens (B, S) int64 in, loss or this rank's logits (B, S, V/tp) out.

    A parameter's name, and so its initial values, follow from the layer's index in the list.

    Args:
        shape: of the model.
        context: how to compute.
        block: class of the blocks.
        qk_norm: as `Attention` takes it.
    """
    last = shape.num_layers + 2
    tied_key = TIED_KEY if shape.tie_embeddings else None
    first = f"tied_modules.{tied_key}" if tied_key else "0"
    build_embedding = partial(Embedding, shape, context, first)
    if tied_key:
        head = Layer(first, Embedding, build_embedding, tied_key, forward=tied_head)
    else:
        head = Layer(str(last), Head, partial(Head, shape, context, str(last)))
    blocks = [
        Layer(
            str(i + 1),
            block,
            partial(block, shape, context, i, str(i + 1), qk_norm),
            recompute=True,
        )
        for i in range(shape.num_layers)
    ]
    return [
        Layer(first, Embedding, build_embedding, tied_key),
        *blocks,
        Layer(str(last - 1), RMSNorm, partial(residual_norm, shape, context)),
        head,
    ]
