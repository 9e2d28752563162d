"""The SwiGLU MLP: down(silu(gate(x)) * up(x)).

Legend: B batch, S sequence, s = S or, with sequence parallelism, S/tp; H hidden, F MLP width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.shape import ModelShape
from megatron.model.layer import ModelContext, recomputed
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linears,
)


class MLP(nn.Module):
    """gate and up column parallel, down row parallel.

    One all-reduce in the forward (after down) and one in the backward (before gate and up); with
    sequence parallelism a reduce-scatter and an all-gather instead of each.
    """

    def __init__(self, shape: ModelShape, context: ModelContext, name: str) -> None:
        """Builds the layers.

        Args:
            shape: of the model.
            context: how to compute.
            name: this module's, `<block>.mlp`.
        """
        super().__init__()
        self.recompute = context.recompute == "selective"
        hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
        options = context.linear_options

        def column(part: str) -> ColumnParallelLinear:
            weight, std = f"{name}.{part}.weight", shape.weight_std
            return ColumnParallelLinear(hidden, ffn, name=weight, std=std, **options)

        self.gate, self.up = column("gate"), column("up")
        self.down = RowParallelLinear(
            ffn, hidden, name=f"{name}.down.weight", std=shape.residual_std, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, s, H) -> (B, s, H); without sequence parallelism equal on all ranks of the axis."""
        gate, up = column_parallel_linears(x, (self.gate, self.up))  # (B, S, F/tp)
        if self.recompute:
            return recomputed(self._product, gate, up)
        return self._product(gate, up)

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        x: Tensor = self.down(F.silu(gate) * up)
        return x
