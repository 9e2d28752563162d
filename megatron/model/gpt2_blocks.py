"""GPT-2's parts: attention and MLP with biases, LayerNorm, and positions before the first block.

Legend: B batch, S sequence, s = S or, with sequence parallelism, a rank's part of it; H hidden, F
MLP width.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.shape import ModelShape
from megatron.model.attention import Attention
from megatron.model.block import Block, decoder_layers
from megatron.model.layer import Layer, ModelContext, recomputed
from megatron.model.layer_norm import LayerNorm
from megatron.model.positions import LearnedPositions
from megatron.parallel.biased import (
    BiasedColumnParallelLinear,
    BiasedRowParallelLinear,
    biased_linears,
)


class BiasedAttention(Attention):
    """Attention whose four linear layers have biases."""

    column, row = BiasedColumnParallelLinear, BiasedRowParallelLinear
    project: Any = staticmethod(biased_linears)


class GeluMLP(nn.Module):
    """down(gelu(up(x))); up column parallel, down row parallel. Communicates as `MLP` does."""

    def __init__(self, shape: ModelShape, context: ModelContext, name: str) -> None:
        """Builds the layers; `name` is this module's, `<block>.mlp`."""
        super().__init__()
        self.recompute = context.recompute == "selective"
        hidden, ffn, options = shape.hidden_size, shape.ffn_hidden_size, context.linear_options
        self.up = BiasedColumnParallelLinear(
            hidden, ffn, name=f"{name}.up.weight", std=shape.weight_std, **options
        )
        self.down = BiasedRowParallelLinear(
            ffn, hidden, name=f"{name}.down.weight", std=shape.residual_std, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, s, H) -> (B, s, H); without sequence parallelism equal on all ranks of the axis."""
        y = self.up(x)  # (B, S, F/tp)
        return recomputed(self._rest, y) if self.recompute else self._rest(y)

    def _rest(self, y: Tensor) -> Tensor:
        x: Tensor = self.down(F.gelu(y, approximate="tanh"))
        return x


class GPT2Block(Block):
    """x + attention(norm(x)), then + mlp(norm(that)): (B, s, H) -> (B, s, H)."""

    def __init__(
        self, shape: ModelShape, context: ModelContext, block: int, name: str, qk_norm: None = None
    ) -> None:
        """Builds attention, MLP and their norms, as `Block` does."""
        nn.Module.__init__(self)  # not Block's: it draws Llama's
        del block, qk_norm
        self.recompute = context.recompute == "full"
        self.input_norm = layer_norm(shape, context)
        self.attention = BiasedAttention(shape, context, f"{name}.attention", rope=None)
        self.post_attention_norm = layer_norm(shape, context)
        self.mlp = GeluMLP(shape, context, f"{name}.mlp")


class FirstBlock(GPT2Block):
    """Adds the positions first: so they are on the first stage of a pipeline, and only there."""

    def __init__(self, shape: ModelShape, context: ModelContext, block: int, name: str) -> None:
        super().__init__(shape, context, block, name)
        self.positions = LearnedPositions(shape, context, f"{name}.positions")

    def _forward(self, x: Tensor) -> Tensor:
        return super()._forward(self.positions(x))


def layer_norm(shape: ModelShape, context: ModelContext) -> LayerNorm:
    """A norm of the residual stream (B, s, H)."""
    return LayerNorm(shape.hidden_size, shape.rms_norm_eps, context.residual_axis)


def gpt2_layers(shape: ModelShape, context: ModelContext) -> list[Layer]:
    """As `decoder_layers`: tokens (B, S) int64 in, loss or this rank's logits (B, S, V/tp) out."""
    embedding, first, *blocks, norm, head = decoder_layers(shape, context, GPT2Block)
    build = partial(FirstBlock, shape, context, 0, first.name)
    first = dataclasses.replace(first, module=FirstBlock, build=build)
    norm = dataclasses.replace(norm, module=LayerNorm, build=partial(layer_norm, shape, context))
    return [embedding, first, *blocks, norm, head]
