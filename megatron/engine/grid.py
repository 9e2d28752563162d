"""DeepSpeed's view of the ranks under a pipeline, answered by arithmetic.

DeepSpeed lists all ranks of the world and searches the list, for groups at the start and for a
neighbour at every send; here nothing is listed, so neither grows with the world.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

from megatron.config.layout import Layout
from megatron.engine.own_groups import groups_of, members_group
from megatron.parallel.groups import Groups


class Topology(PipeModelDataParallelTopology):
    """Rank <-> (pipe, data, model) without a table; the order is that of `Layout`."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(num_pp=1, num_mp=1, num_dp=1)  # its table is not looked at
        self.dims = [layout.pp, layout.dp, layout.tp]
        self._layout = layout

    def get_coord(self, rank: int) -> Any:
        place = self._layout.coordinates(rank)
        return self.ProcessCoord(pipe=place.pp, data=place.dp, model=place.tp)

    def get_rank(self, **coordinates: int) -> int:
        place = coordinates
        return self._layout.rank(place["pipe"], place["data"], place["model"])

    def world_size(self) -> int:
        return self._layout.world


class Grid(PipelineParallelGrid):
    """The groups of this rank: those the run has already, and one of all that shares a model."""

    def __init__(self, groups: Groups, topology: Topology) -> None:
        # The parent's __init__ makes every group of the world; this one replaces it.
        layout, rank = groups.layout, groups.rank
        self._topo = topology
        self.global_rank, self.world_size = rank, layout.world
        self.data_parallel_size, self.pipe_parallel_size = layout.dp, layout.pp
        self.model_parallel_size = self.slice_parallel_size = layout.tp
        self.stage_id, self.data_parallel_id = groups.pp.rank, groups.dp.rank
        self.is_first_stage = groups.pp.rank == 0
        self.is_last_stage = groups.pp.rank == groups.pp.size - 1
        tp, dp, pp = groups_of(groups.tp, groups.dp, groups.pp)
        self.dp_group, self.dp_proc_group = list(groups.dp.ranks), dp
        self.pp_group, self.pp_proc_group = list(groups.pp.ranks), pp
        self.slice_group, self.slice_proc_group = list(groups.tp.ranks), tp
        # Norms and overflows are summed over all slices and stages of one copy of the model.
        copy = _model_ranks(groups)
        self.ds_model_proc_group = pp if layout.tp == 1 else members_group(copy)
        self.ds_model_world_size, self.ds_model_rank = len(copy), copy.index(rank)


def _model_ranks(groups: Groups) -> list[int]:
    """Ranks that hold one copy of the model with this one, in order."""
    layout = groups.layout
    return [
        layout.rank(pipe, groups.dp.rank, model)
        for pipe in range(layout.pp)
        for model in range(layout.tp)
    ]


def tied_group(groups: Groups, stages: list[int]) -> tuple[list[int], dist.ProcessGroup]:
    """The ranks of this one's pipeline at `stages`, and their group (made by all of them)."""
    ranks = [groups.pp.ranks[stage] for stage in stages]
    if len(ranks) == groups.pp.size:
        return ranks, groups.pp.group
    return ranks, members_group(ranks)
