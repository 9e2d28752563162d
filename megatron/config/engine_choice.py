"""ENGINE: our sharded optimizer step where it can run, DeepSpeed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ENGINES = ("auto", "sharded", "deepspeed")


class Limit(NamedTuple):
    """What the sharded engine does not do.

    Attributes:
        key: of the option that asks for it.
        asks: whether its value does.
        why: in words.
    """

    key: str
    asks: Callable[[Any], bool]
    why: str


LIMITS = (
    Limit("parallel.pipeline_parallel", lambda stages: stages > 1, "pipelines are DeepSpeed's"),
    Limit("parallel.zero_stage", lambda stage: stage == 3, "weights stay whole on each rank"),
    Limit("parallel.cpu_optimizer", bool, "states stay on the device"),
    Limit("train.dtype", lambda dtype: dtype == "fp16", "it has no loss scaler"),
)
"""hpZ and MiCS need ZeRO-3."""


def limit(values: Mapping[str, Any]) -> Limit | None:
    """The first limit that settings meet, None where the sharded engine can run.

    Args:
        values: option key -> value, of the keys in LIMITS.
    """
    return next((one for one in LIMITS if one.asks(values[one.key])), None)


class ShardedSettings(NamedTuple):
    """What the sharded engine is given.

    Attributes:
        dtype: of weights and activations, fp32 or bf16.
        sent_in: type in which gradients go over the ranks, fp32 or bf16.
        accumulation_steps: micro-batches of a step.
        reduces_each: reduce gradients after every micro-batch, and keep this rank's part only
            (ZeRO 2).
        clip_grad: largest gradient norm; 0: no clipping.
    """

    dtype: str
    sent_in: str
    accumulation_steps: int
    reduces_each: bool
    clip_grad: float
