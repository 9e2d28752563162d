"""What the engine is given besides model and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (output of the last layer, labels) -> scalar
MicroBatches = Iterable[tuple[Tensor, Tensor]]  # (tokens, labels), each (B, S)
MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class EngineOptions:
    """What the engine needs besides model and data.

    Attributes:
        deepspeed_config: DeepSpeed's JSON as a dict.
        gradient_accumulation_steps: micro-batches of a step.
        stage_bounds: cuts of the layer list, one more than there are stages (two stages a rank
            with the schedule dualpipev).
        device: where the model lives.
        compile: compile each block.
        recompute_num_layers: keep the input of every n-th block only; 0: leave it to the blocks.
        mics_shard_size: ZeRO-3 shards inside groups of this many data-parallel ranks; 0: over all.
        pipeline_schedule: 1f1b or dualpipev.
    """

    deepspeed_config: dict[str, Any]
    gradient_accumulation_steps: int
    stage_bounds: tuple[int, ...]
    device: torch.device
    compile: bool = False
    recompute_num_layers: int = 0
    mics_shard_size: int = 0
    pipeline_schedule: str = "1f1b"

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's section about ZeRO."""
        return self.deepspeed_config["zero_optimization"]
