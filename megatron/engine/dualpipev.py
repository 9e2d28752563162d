"""DualPipeV, a schedule that gives each rank two stages; DeepSpeed has it since 0.19.8."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.pipe import DualPipeVModule

from megatron.engine.pipeline_module import Stages
from megatron.model.layer import Layer


class DualPipeV(DualPipeVModule, Stages):  # type: ignore[misc]
    """Two stages per rank: rank r has stages r and 2p - 1 - r of 2p, the first rank the loss."""

    num_stages_per_rank = 2

    def activate_stage(self, stage: int) -> None:
        self.activate_phase(stage)

    def _arrange(self, layers: Sequence[Layer], length: int) -> None:
        for phase in (1, 0):
            self.activate_phase(phase)
            super()._arrange(layers, length)
            self.phase_funcs[phase] = self.forward_funcs
