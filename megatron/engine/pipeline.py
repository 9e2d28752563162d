"""The list of layers as DeepSpeed's pipeline: our cuts, our groups, its two schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import module as deepspeed_module
from torch import nn

from megatron.engine.distributed import quiet
from megatron.engine.grid import Grid, Topology, tied_group
from megatron.engine.options import EngineOptions, LossFunction
from megatron.engine.own_groups import made_by_members, replaced
from megatron.model.layer import Layer
from megatron.model.stack import recompute_runs
from megatron.parallel.groups import Groups


def pipeline_module(
    layers: Sequence[Layer], loss: LossFunction, groups: Groups, options: EngineOptions
) -> PipelineModule:
    """This rank's stage (or its two stages) of the model.

    Args:
        layers: the model.
        loss: of the last layer's output.
        groups: of this rank.
        options: cuts, schedule and recomputation are looked at.
    """
    kind = SCHEDULES[options.pipeline_schedule]
    bounds, stages = options.stage_bounds, groups.layout.pp * kind.num_stages_per_rank
    assert len(bounds) == stages + 1 and bounds[-1] == len(layers), f"{bounds=} {groups.layout=}"
    with quiet(), made_by_members():
        return kind(layers, groups, options, loss_fn=loss, topology=Topology(groups.layout))


class _Pipeline(PipelineModule):
    """PipelineModule with given cuts and this rank's groups alone.

    Its own search for cuts builds every layer on every rank.
    """

    num_stages_per_rank = 1

    def __init__(
        self, layers: Sequence[Layer], groups: Groups, options: EngineOptions, **kwargs: Any
    ) -> None:
        self._bounds = options.stage_bounds
        self._groups = groups
        specs = [_TiedSpec(x) if x.tied_key else _Spec(x) for x in layers]
        with replaced(deepspeed_module, "PipelineParallelGrid", self._make_grid):
            super().__init__(specs, **kwargs)
        self._recompute(layers, options.recompute_num_layers)

    def _make_grid(self, process_group: Any, topology: Topology) -> Grid:
        del process_group
        return Grid(self._groups, topology)

    def _partition_layers(self, method: str = "given") -> None:
        del method
        self.parts = list(self._bounds)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _recompute(self, layers: Sequence[Layer], length: int) -> None:
        local = layers[self._local_start : self._local_stop]
        self.forward_funcs = recompute_runs(
            self.forward_funcs, [layer.recompute for layer in local], length
        )

    def _index_tied_modules(self) -> dict[str, dict[str, Any]]:
        """What DeepSpeed keeps of each tied weight; the original makes the groups of all ranks."""
        result = {}
        for key in sorted({s.key for s in self._layer_specs if isinstance(s, TiedLayerSpec)}):
            owners = {
                self.stage_owner(index)
                for index, spec in enumerate(self._layer_specs)
                if isinstance(spec, TiedLayerSpec) and spec.key == key
            }
            if len(owners) == 1 or self.stage_id not in owners:
                continue  # on one rank, both uses are of one module
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


class _DualPipeV(DualPipeVModule, _Pipeline):
    """Two stages a rank: rank r has stages r and 2p - 1 - r of 2p, the first rank the loss."""

    num_stages_per_rank = 2

    def _recompute(self, layers: Sequence[Layer], length: int) -> None:
        for phase in (1, 0):
            self.activate_phase(phase)
            super()._recompute(layers, length)
            self.phase_funcs[phase] = self.forward_funcs


SCHEDULES: dict[str, type[_Pipeline]] = {"1f1b": _Pipeline, "dualpipev": _DualPipeV}


def activate_stage(module: nn.Module, stage: int) -> None:
    """Makes a call of the module one of its first or second stage."""
    if isinstance(module, DualPipeVModule):
        module.activate_phase(stage)


def reduce_tied_gradients(engine: Any) -> None:
    """Sums the gradients of tied weights over the stages that use them, before all reductions.

    DeepSpeed's own looks for them in `grad`; bf16 with the optimizer on the host adds them up in
    `grad_accum`, where they would stay those of one stage.
    """
    if not getattr(engine.optimizer, "use_grad_accum_attribute", False):
        engine._exec_reduce_tied_grads()
        return
    for weight, group in engine.module.get_tied_weights_and_groups():
        dist.all_reduce(weight.grad_accum, group=group)


class _Spec(LayerSpec):
    """A layer of ours, built on the stage that owns it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.module)
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        del log
        return self._layer.build()


class _TiedSpec(TiedLayerSpec):
    """A layer of ours whose weight is also used by another one."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.tied_key, layer.module, forward_fn=layer.forward)
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        del log
        return self._layer.build()
