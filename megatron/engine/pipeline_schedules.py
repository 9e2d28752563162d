"""The pipeline's schedules: which module holds this rank's stage, or its two stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import deepspeed

from megatron.config.errors import ConfigError
from megatron.engine.distributed import quiet
from megatron.engine.patches import patch_new_group
from megatron.engine.pipeline_module import Stages, Topology
from megatron.launch.versions import lacking
from megatron.model.layer import Layer
from megatron.parallel.groups import Groups
from megatron.parallel.head_loss import TargetsOf


def _dualpipev() -> type[Stages]:
    """Imported where it is used: not all versions of DeepSpeed have it.

    Raises:
        ConfigError: this one has not.
    """
    problem = lacking("dualpipev", {"deepspeed": deepspeed.__version__})
    if problem:
        raise ConfigError(f"PIPELINE_SCHEDULE=dualpipev {problem}; set PIPELINE_SCHEDULE=1f1b")
    from megatron.engine.dualpipev import DualPipeV

    return DualPipeV


SCHEDULES: dict[str, Callable[[], type[Stages]]] = {
    "1f1b": lambda: Stages,
    "dualpipev": _dualpipev,
}


def pipeline_module(
    layers: Sequence[Layer],
    targets: TargetsOf,
    groups: Groups,
    bounds: Sequence[int],
    recompute_num_layers: int,
    schedule: str,
) -> Stages:
    """This rank's stage (or its two stages) of the model.

    Args:
        layers: the model.
        targets: what the loss of a micro-batch is measured against.
        groups: of this rank, the sequence axis counted as data.
        bounds: into the list of layers, one more than there are stages.
        recompute_num_layers: keep the input of every n-th block only; 0: leave it to the blocks.
        schedule: 1f1b or dualpipev.
    """
    layout, kind = groups.layout, SCHEDULES[schedule]()
    stages = layout.pp * kind.num_stages_per_rank
    assert len(bounds) == stages + 1 and bounds[-1] == len(layers), f"{bounds=} {layout=}"
    with quiet(), patch_new_group():
        return kind(
            layers, groups, bounds, recompute_num_layers, targets, topology=Topology(layout)
        )
