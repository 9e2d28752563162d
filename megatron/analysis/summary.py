"""A run in a few numbers, made from raw sums of tokens and seconds, never from means of rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WARM_UP = 3
"""Records left out of the rates at the start: compilation, first allocations, cold files."""


@dataclass(frozen=True)
class Throughput:
    """Rates over the steps that did work, warm-up left out.

    Attributes:
        steps: steps counted.
        tokens: tokens of these steps, all devices together.
        seconds: their time, evaluation and saving not included.
        world_size: devices.
        step_seconds: seconds per step: 10th percentile, median, 90th percentile.
        tflops_lm: per device, full attention; from the same sums.
    """

    steps: int
    tokens: int
    seconds: float
    world_size: int
    step_seconds: tuple[float, float, float]
    tflops_lm: float

    @property
    def tokens_per_s(self) -> float:
        """All devices together."""
        return self.tokens / self.seconds

    @property
    def steps_per_s(self) -> float:
        """Steps that did work."""
        return self.steps / self.seconds

    @property
    def steps_per_gpu_per_s(self) -> float:
        """Steps by the devices that they took."""
        return self.steps_per_s / self.world_size

    @property
    def tokens_per_gpu_per_s(self) -> float:
        """One device."""
        return self.tokens_per_s / self.world_size


def training_steps(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records of the steps that did work, by iteration; a later record replaces an earlier one."""
    steps = {record["iteration"]: record for record in records if record["event"] == "step"}
    return [steps[iteration] for iteration in sorted(steps)]


def throughput(records: Iterable[Mapping[str, Any]], warm_up: int = WARM_UP) -> Throughput | None:
    """Rates of a run; None where no step did work.

    Args:
        records: records of metrics.jsonl.
        warm_up: records left out at the start; fewer where the run has less than twice as many.
    """
    steps = training_steps(records)
    if not steps:
        return None
    steps = steps[min(warm_up, len(steps) // 2) :]
    seconds = math.fsum(r["elapsed_s"] * r["steps"] for r in steps)
    times = [r["elapsed_s"] for r in steps]
    # Of a single value there are no quantiles.
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return Throughput(
        steps=sum(r["steps"] for r in steps),
        tokens=sum(r["steps"] * r["global_batch_size"] * r["seq_length"] for r in steps),
        seconds=seconds,
        world_size=steps[-1]["world_size"],
        step_seconds=(tenths[0], statistics.median(times), tenths[-1]),
        tflops_lm=math.fsum(r["tflops_lm"] * r["elapsed_s"] * r["steps"] for r in steps) / seconds,
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
