"""Two runs step by step: how far losses and gradient norms are apart, and from which step on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.analysis.summary import training_steps

COMPARED = ("loss", "grad_norm")

Records = Sequence[Mapping[str, Any]]


def gap(a: float | None, b: float | None) -> float:
    """Absolute difference: 0 where both are NaN or absent, infinite where only one is."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    distance = abs(a - b)
    return math.inf if math.isnan(distance) else distance


def step_gaps(a: Records, b: Records) -> dict[str, Any]:
    """Steps that both runs, or only one, have; largest differences, first step with one."""
    steps_a = {record["iteration"]: record for record in training_steps(a)}
    steps_b = {record["iteration"]: record for record in training_steps(b)}
    matched = sorted(steps_a.keys() & steps_b.keys())
    found: dict[str, Any] = {
        "matched_iterations": len(matched),
        "only_in_a": len(steps_a.keys() - steps_b.keys()),
        "only_in_b": len(steps_b.keys() - steps_a.keys()),
    }
    for name in COMPARED:
        gaps = {i: gap(steps_a[i].get(name), steps_b[i].get(name)) for i in matched}
        found[f"max_{name}_difference"] = max(gaps.values(), default=0.0)
        found[f"first_iteration_with_different_{name}"] = next(
            (i for i in matched if gaps[i] > 0), None
        )
    return found


def disagreement(found: Mapping[str, Any], tolerance: float) -> str:
    """Why the runs are not equal within `tolerance`; empty where they are."""
    if not found["matched_iterations"]:
        return "no iteration is in both runs"
    only_a, only_b = found["only_in_a"], found["only_in_b"]
    if only_a or only_b:
        return f"iterations do not match: {only_a} only in A, {only_b} only in B"
    for name in COMPARED:
        worst = found[f"max_{name}_difference"]
        if worst > tolerance:
            return f"{name} differs by {worst:.3g}, more than {tolerance:g}"
    return ""
