"""The list of layers as DeepSpeed's pipeline: our stage bounds, our groups.

DeepSpeed searches a list of all ranks for groups at the start and for a neighbour at every send.
Here both are computed, so neither grows with the world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import module as deepspeed_module
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.config.layout import Layout
from megatron.engine.distributed import groups_of
from megatron.engine.patches import members_group, replaced
from megatron.model.layer import Layer
from megatron.model.stack import recompute_runs
from megatron.parallel.groups import Groups
from megatron.parallel.head_loss import TargetsOf


class Stages(PipelineModule):  # type: ignore[misc]
    """PipelineModule with given bounds and this rank's groups alone.

    The last stage gives hidden states; its head makes the loss of them, or logits.

    Attributes:
        head: (hidden (B, s, H), targets or nothing) -> loss or logits, on the last stage's rank.
        targets: what the loss of a micro-batch is measured against.
    """

    num_stages_per_rank = 1
    head: Callable[..., Tensor]

    def __init__(
        self,
        layers: Sequence[Layer],
        groups: Groups,
        bounds: Sequence[int],
        recompute_num_layers: int,
        targets: TargetsOf,
        **kwargs: Any,
    ) -> None:
        self.forward_funcs: list[Callable[..., Tensor]]
        self._bounds = bounds
        self._groups = groups
        specs = [_TiedSpec(x) if x.tied_key else _Spec(x) for x in layers]
        with replaced(deepspeed_module, "PipelineParallelGrid", self._make_grid):
            super().__init__(specs, **kwargs)
        self.targets = targets
        self.loss_fn = lambda hidden, labels: self.head(hidden, self.targets(labels))
        self._arrange(layers, recompute_num_layers)

    def activate_stage(self, stage: int) -> None:
        """Selects this rank's first or second stage for the next calls of the module."""

    def _make_grid(self, process_group: Any, topology: Topology) -> Grid:
        del process_group
        return Grid(self._groups, topology)

    def _partition_layers(self, method: str = "given") -> None:
        del method
        self.parts = list(self._bounds)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _arrange(self, layers: Sequence[Layer], length: int) -> None:
        """Joins recomputed layers, and takes the head out of the last stage."""
        local = layers[self._local_start : self._local_stop]
        if self._local_stop == len(layers):
            self.head = partial(self.forward_funcs.pop())  # a module would be registered again
            local = local[:-1]
        self.forward_funcs = recompute_runs(
            self.forward_funcs, [layer.recompute for layer in local], length
        )

    def _index_tied_modules(self) -> dict[str, dict[str, Any]]:
        """What DeepSpeed keeps of each tied weight, on the ranks that have it."""
        result: dict[str, dict[str, Any]] = {}
        for key in sorted({s.key for s in self._layer_specs if isinstance(s, TiedLayerSpec)}):
            owners = {
                self.stage_owner(index)
                for index, spec in enumerate(self._layer_specs)
                if isinstance(spec, TiedLayerSpec) and spec.key == key
            }
            if len(owners) == 1 or self.stage_id not in owners:
                continue  # both uses on one rank share a module
            ranks, group = tied_group(self._groups, sorted(owners))
            module = self.tied_modules[key]
            result[key] = {
                "ranks": ranks,
                "group": group,
                "weight_attr": self.tied_weight_attrs[key],
                "module": module,
            }
            for parameter in module.parameters():
                # Norm and checkpoint count a tied weight once.
                parameter.ds_pipe_replicated = self.global_rank != ranks[0]
        return result


class _Spec(LayerSpec):  # type: ignore[misc]
    """A layer of ours, built on the stage that owns it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.module)
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        del log
        return self._layer.build()


class _TiedSpec(_Spec, TiedLayerSpec):  # type: ignore[misc]
    """A layer of ours whose weight another layer uses too."""

    def __init__(self, layer: Layer) -> None:
        TiedLayerSpec.__init__(self, layer.tied_key, layer.module, forward_fn=layer.forward)
        self._layer = layer


class Topology(PipeModelDataParallelTopology):  # type: ignore[misc]
    """Rank <-> (pipe, data, model) without a table; the order is that of `Layout`."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(num_pp=1, num_mp=1, num_dp=1)  # its table is not used
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


class Grid(PipelineParallelGrid):  # type: ignore[misc]
    """The groups of this rank: those of the run, and one of all ranks of a replica."""

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
        # Norms and overflows are summed over all slices and stages of one replica of the model.
        stages, slices, data = range(layout.pp), range(layout.tp), groups.dp.rank
        replica = [layout.rank(stage, data, place) for stage in stages for place in slices]
        self.ds_model_proc_group = pp if layout.tp == 1 else members_group(replica)
        self.ds_model_world_size, self.ds_model_rank = len(replica), replica.index(rank)


def tied_group(groups: Groups, stages: list[int]) -> tuple[list[int], Any]:
    """The ranks of this one's pipeline at `stages`, and their group (made by all of them)."""
    ranks = [groups.pp.ranks[stage] for stage in stages]
    if len(ranks) == groups.pp.size:
        return ranks, groups.pp.group
    return ranks, members_group(ranks)
