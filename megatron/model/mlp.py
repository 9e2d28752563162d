"""The SwiGLU MLP: down(silu(gate(x)) * up(x)).

Legend: B batch, S sequence, s = S or, with sequence parallelism, S/tp; H hidden, F MLP width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.llama_config import LlamaConfig
from megatron.model.recompute import recomputed
from megatron.parallel.groups import Axis
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear, column_products


class MLP(nn.Module):
    """gate and up column parallel, down row parallel.

    One all-reduce in the forward (after down) and one in the backward (before gate and up); with
    sequence parallelism a reduce-scatter and an all-gather instead of each.
    """

    def __init__(self, config: LlamaConfig, tp: Axis, name: str) -> None:
        """Builds the layers.

        Args:
            config: shape of the model.
            tp: tensor-parallel axis.
            name: this module's, `<block>.mlp`.
        """
        super().__init__()
        self.recompute = config.recompute == "selective"
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        shared: dict[str, Any] = {
            "seed": config.seed,
            "sequence_parallel": config.sequence_parallel,
        }

        def column(part: str) -> ColumnParallelLinear:
            weight, std = f"{name}.{part}.weight", config.weight_std
            return ColumnParallelLinear(hidden, ffn, tp, name=weight, std=std, **shared)

        self.gate = column("gate")
        self.up = column("up")
        self.down = RowParallelLinear(
            ffn, hidden, tp, name=f"{name}.down.weight", std=config.residual_std, **shared
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, s, H) -> (B, s, H); without sequence parallelism equal on all ranks of the axis."""
        gate, up = column_products(x, (self.gate, self.up))  # (B, S, F/tp)
        if self.recompute:
            return recomputed(self._product, gate, up)
        return self._product(gate, up)

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down(F.silu(gate) * up)
