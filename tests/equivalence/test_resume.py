"""A resumed run is the one never stopped: bit for bit in its own layout, to 1e-5 in any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.equivalence.case import Case, curves, resumed, saved

K = 3

SAME = [
    Case(optimizer="adamw"),
    Case(tp=2, optimizer="adamw"),
    Case(pp=2, tied=True, gas=2, optimizer="adamw"),
    Case(dp=2, optimizer="adamw", zero_stage=1),
    Case(dp=2, optimizer="adamw", zero_stage=2),
    Case(dp=2, optimizer="adamw", zero_stage=3),
    Case(dp=2, optimizer="adamw", dtype="bf16"),
    Case(dp=2, optimizer="adamw", dtype="bf16", zero_stage=3),
    Case(optimizer="adamw", dtype="fp16"),
    pytest.param(Case(dp=2, optimizer="adamw", engine="deepspeed"), marks=pytest.mark.long),
]


@pytest.mark.parametrize("case", SAME, ids=str)
def test_same_layout_bit_for_bit(case: Case, tmp_path: Path) -> None:
    whole = curves(replace(case, steps=2 * K))[0]
    first = saved(case, K, tmp_path)
    assert first + resumed(case, K, tmp_path)[0] == whole


OTHER = [
    ({"tp": 2}, {"dp": 2, "zero_stage": 3}),
    ({"dp": 2, "zero_stage": 3}, {"tp": 2, "pp": 2}),
    ({"tp": 2, "pp": 2}, {}),
    ({"pp": 2, "dp": 2}, {"tp": 4}),
    ({}, {"pp": 4}),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("before", "after"), OTHER, ids=str)
def test_other_layout(before: dict, after: dict, tied: bool, tmp_path: Path) -> None:
    written, read = (
        Case(**layout, tied=tied, gas=2, optimizer="adamw") for layout in (before, after)
    )
    whole = curves(Case(tied=tied, gas=2, optimizer="adamw", steps=2 * K))[0]
    saved(written, K, tmp_path)
    for curve in resumed(read, K, tmp_path):
        for (a, b), (c, d) in zip(whole[K:], curve, strict=True):
            assert a == pytest.approx(c, abs=1e-5)
            assert b == pytest.approx(d, abs=1e-5)
