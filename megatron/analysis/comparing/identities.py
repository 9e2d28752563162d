"""What must hold in the records of any run: what a step holds is what the batch says.

A published table had tokens/s of one device beside samples/s of all: no row of it tells, the
identities do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatron.analysis.comparing.figures import Sums

Recorded = Mapping[str, Any]
Sides = Iterator[tuple[int, float, float]]
"""Step, what was counted, what the batch says."""

CLOSE = 1e-6


@dataclass(frozen=True)
class Identity:
    """One identity: its two sides in words, and as numbers wherever both are known."""

    left: str
    right: str
    sides: Callable[[Sums], Sides]


def _counted(sums: Sums) -> Iterator[tuple[Recorded, Recorded]]:
    """Neighbouring records of steps with one batch size, the first from nothing."""
    counters = {r["iteration"]: r for r in sums.run.records if r["event"] in ("step", "skip")}
    records = [counters[iteration] for iteration in sorted(counters)]
    if records and records[0]["iteration"] == 1:
        nothing = {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0}
        records.insert(0, records[0] | nothing)
    yield from (
        (a, b) for a, b in pairwise(records) if a["global_batch_size"] == b["global_batch_size"]
    )


def _samples_a_step(sums: Sums) -> Sides:
    for a, b in _counted(sums):
        counted = b["consumed_samples"] - a["consumed_samples"]
        yield b["iteration"], counted / (b["iteration"] - a["iteration"]), b["global_batch_size"]


def _tokens_a_step(sums: Sums) -> Sides:
    for a, b in _counted(sums):
        counted = b["consumed_tokens"] - a["consumed_tokens"]
        expected = b["global_batch_size"] * b["seq_length"]
        yield b["iteration"], counted / (b["iteration"] - a["iteration"]), expected


def _rated(rate: str, expected: Callable[[Recorded], float]) -> Callable[[Sums], Sides]:
    def sides(sums: Sums) -> Sides:
        same = {b["iteration"] for _, b in _counted(sums)}
        for r in sums.steps:
            if r["iteration"] in same and r.get(rate) is not None:
                yield r["iteration"], r[rate] * r["elapsed_s"], expected(r)

    return sides


def _devices(sums: Sums) -> Sides:
    for r in sums.steps:
        yield r["iteration"], r["tokens_per_gpu_per_s"] * r["world_size"], r["tokens_per_s"]


def _batch(sums: Sums) -> Sides:
    sizes = [
        sums.setting(f"train.{name}")
        for name in ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size")
    ]
    replicas = sums.last("data_parallel")
    if replicas and all(isinstance(size, int) for size in sizes):
        micro, steps, whole = (int(size) for size in sizes if isinstance(size, int))
        yield sums.last("iteration"), micro * steps * replicas, whole


IDENTITIES = (
    Identity("samples of a step, counted", "GBS", _samples_a_step),
    Identity("tokens of a step, counted", "GBS x SEQ", _tokens_a_step),
    Identity(
        "samples/s x s/step", "GBS", _rated("samples_per_s", lambda r: r["global_batch_size"])
    ),
    Identity(
        "tokens/s x s/step",
        "GBS x SEQ",
        _rated("tokens_per_s", lambda r: r["global_batch_size"] * r["seq_length"]),
    ),
    Identity("tokens/s per device x devices", "tokens/s", _devices),
    Identity("MICRO_BATCH x GRAD_ACC_STEPS x DP", "GLOBAL_BATCH", _batch),
)


def violations(sums: Sums) -> list[str]:
    """A line for each identity that does not hold: first step, both sides, how often."""
    lines = []
    for identity in IDENTITIES:
        sides = list(identity.sides(sums))
        wrong = [side for side in sides if not math.isclose(side[1], side[2], rel_tol=CLOSE)]
        if wrong:
            step, left, right = wrong[0]
            lines.append(
                f"{identity.left} = {left:,.6g}, but {identity.right} = {right:,.6g}, at step "
                f"{step}; {len(wrong)} of {len(sides)} records"
            )
    return lines
