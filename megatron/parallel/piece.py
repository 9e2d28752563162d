"""A run of one parameter with its optimizer states: what engines give and checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

WEIGHT = "weight"
WHOLE = "whole."  # marks states of rules that keep whole matrices, in shapes of their own


@dataclass(frozen=True)
class Piece:
    """A run of one global parameter with its states, as a checkpoint holds it.

    Attributes:
        name: parameter, as in the model.
        shape: of the whole parameter, over all tensor-parallel ranks.
        partition_dim: dimension sharded over tensor-parallel ranks; None: replicated.
        shard, shards: index of the tensor-parallel shard, and number of shards.
        start: first element in the flattened shard.
        tensors: 1-D values by state; `weight` is the fp32 weight, the rest the optimizer's.
        scalars: the optimizer's numbers for this parameter, such as its step.
    """

    name: str
    shape: tuple[int, ...]
    partition_dim: int | None
    shard: int
    shards: int
    start: int
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, float] = field(default_factory=dict)
