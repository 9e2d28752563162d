"""A learned vector for each position, added to the residual stream.

Legend: B batch, S sequence, p = S/sp, s = p or, with Megatron's sequence parallelism, p/tp; H
hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.shape import ModelShape
from megatron.model.layer import ModelContext
from megatron.parallel.biased import ReplicatedWeights
from megatron.parallel.init import sharded_normal_


class LearnedPositions(ReplicatedWeights):
    """x + table[position]; the table (S, H) is whole on every rank.

    A rank looks up the positions that it holds. Those it does not hold have no gradient there.
    """

    def __init__(self, shape: ModelShape, context: ModelContext, name: str) -> None:
        """Builds the table, `name` is this module's."""
        super().__init__()
        self.axis, self.sp = context.residual_axis, context.sp
        self.starts_at: Callable[[], int] | None = None  # `kv_cache.py` sets it; none: at 0
        self.positions_of: Callable[[], Tensor] | None = None  # `document_mask.py` sets it
        size, std = (shape.seq_length, shape.hidden_size), shape.weight_std
        table = sharded_normal_(
            torch.empty(size), seed=context.seed, name=f"{name}.weight", shape=size, std=std
        )
        self.weight = self.replicated(table)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, s, H) -> (B, s, H)."""
        own = x.shape[1]
        part = self.sp.rank * self.axis.size + self.axis.rank  # of the sequence's equal parts
        first = part * own + (0 if self.starts_at is None else self.starts_at())
        held = slice(first, first + own)
        table = self.applied(self.weight)
        if self.positions_of is None:
            return x + table[held]
        return x + F.embedding(self.positions_of()[:, held], table)
