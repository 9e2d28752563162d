"""The training engine: DeepSpeed behind one interface, and behind this one package.

One stage (PP = 1) runs `Stack` under DeepSpeedEngine, ZeRO 1-3; more stages run `PipelineModule`
under PipelineEngine, ZeRO 1. Both are built from the same list of layers, name their parameters
alike and give the same losses. Nothing else in the project imports deepspeed.
"""

from __future__ import annotations

from megatron.engine.distributed import start_distributed
from megatron.engine.engine import Engine
from megatron.engine.options import EngineOptions, LossFunction, MakeOptimizer, MicroBatches

__all__ = [
    "Engine",
    "EngineOptions",
    "LossFunction",
    "MakeOptimizer",
    "MicroBatches",
    "start_distributed",
]
