"""Every layout gives the losses and gradient norms of one process."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from tests.equivalence.case import Case, curves, reference

LAYOUTS = {
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
    "dp2": {"dp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-dp2": {"tp": 2, "dp": 2},
    "pp2-dp2": {"pp": 2, "dp": 2},
    "tp2-pp2-dp2": {"tp": 2, "pp": 2, "dp": 2},
}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


def zero_stages(layout: dict[str, int]) -> tuple[int, ...]:
    """Stages as engines get them; ZERO_STAGE=0 runs as 1 (test_deepspeed_config)."""
    return (1,) if "pp" in layout else (1, 2, 3)


MATRIX = [
    Case(**layout, zero_stage=stage, tied=tied, gas=gas, dtype=dtype)
    for dtype in TOLERANCE
    for layout in LAYOUTS.values()
    for stage, tied, gas in itertools.product(zero_stages(layout), (False, True), (1, 4))
]


DEEPSPEED = [  # where the sharded engine is the default
    Case(**LAYOUTS[layout], zero_stage=stage, gas=4, dtype=dtype, engine="deepspeed")
    for layout, stage, dtype in (
        ("dp2", 1, "fp32"), ("dp2", 1, "bf16"), ("dp2", 2, "bf16"), ("tp2-dp2", 1, "fp32"),
    )
]  # fmt: skip


def is_quick(case: Case) -> bool:
    """An eighth of the matrix: every layout and stage, tied and untied, both accumulations."""
    chosen = {1: (True, 4), 2: (False, 1), 3: (True, 1)}[case.zero_stage]
    return case.dtype == "fp32" and (case.tied, case.gas) == chosen


@cache
def one_process(case: Case) -> list[tuple[float, float]]:
    """The curve to compare with; computed once for all layouts of a model."""
    return curves(case)[0]


def worst(case: Case) -> tuple[float, float]:
    """Largest distance of loss, and of gradient norm relative to it, over steps and ranks."""
    expected = one_process(reference(case))
    loss = norm = 0.0
    for curve in curves(case):
        for (a, b), (c, d) in zip(expected, curve, strict=True):
            loss = max(loss, abs(a - c))
            norm = max(norm, abs(b - d) / max(1.0, b))
    return loss, norm


def check(case: Case) -> None:
    loss, norm = worst(case)
    tolerance = TOLERANCE[case.dtype]
    assert loss <= tolerance and norm <= tolerance, f"{case}: loss {loss:.2e}, norm {norm:.2e}"


def test_the_clip_binds() -> None:
    """Else a wrong norm would not be seen in the losses."""
    for case in {reference(case) for case in MATRIX}:
        assert min(norm for _, norm in one_process(case)) > 0.3


@pytest.mark.parametrize("case", [case for case in MATRIX if is_quick(case)], ids=str)
def test_layout(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [*(case for case in MATRIX if not is_quick(case)), *DEEPSPEED], ids=str
)
def test_layout_long(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_activation_checkpointing(layout: dict[str, int], recompute: str) -> None:
    check(Case(**layout, recompute=recompute, gas=2))
