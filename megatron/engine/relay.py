"""Forward through the pipeline stages by plain sends, for inputs of any length.

PipelineEngine keeps the shape of what it sends; a sampled text grows by a token a step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from megatron.engine.pipeline import activate_stage
from megatron.parallel.groups import Axis


def route(ranks: int, num_stages_per_rank: int) -> list[tuple[int, int]]:
    """(place on the pipeline axis, which of its stages) of each stage in order: out, and back."""
    out = [(place, 0) for place in range(ranks)]
    return (
        out if num_stages_per_rank == 1 else out + [(place, 1) for place in reversed(range(ranks))]
    )


def relay(module: Module, pp: Axis, tokens: Tensor, num_stages_per_rank: int) -> Tensor | None:
    """The last stage's output on the rank that has it, None on the others; a collective.

    Args:
        module: this rank's stages.
        pp: pipeline axis.
        tokens: (B, S) int64, equal on all ranks.
        num_stages_per_rank: 2 with the schedule dualpipev.
    """
    stops = route(pp.size, num_stages_per_rank)
    hidden = tokens
    for number, (place, stage) in enumerate(stops):
        if place != pp.rank:
            continue
        before = stops[number - 1][0] if number else place
        if before != place:
            hidden = _receive(pp.ranks[before], next(module.parameters()).dtype, tokens.device)
        activate_stage(module, stage)
        hidden = module(hidden)
        after = stops[number + 1][0] if number + 1 < len(stops) else place
        if after != place:
            _send(hidden, pp.ranks[after])
    return hidden if pp.rank == stops[-1][0] else None


def _send(value: Tensor, rank: int) -> None:
    dist.send(torch.tensor(value.shape, device=value.device), dst=rank)
    dist.send(value.contiguous(), dst=rank)


def _receive(rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (B, S, H) tensor of any lengths."""
    shape = torch.empty(3, dtype=torch.int64, device=device)
    dist.recv(shape, src=rank)
    value = torch.empty(shape.tolist(), dtype=dtype, device=device)
    dist.recv(value, src=rank)
    return value
