"""Every update rule through the engine: any layout, and a resume, give the one-process run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.update_rules import accepted
from tests.equivalence import front
from tests.spawn import run

LAYOUTS = {
    "tp2-dp2": {"TP": "2", "WORLD_SIZE": "4"},
    "tp2-pp2-tied": {"TP": "2", "PP": "2", "TIE_EMBEDDINGS": "1"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", [rule for rule in accepted() if rule not in ("muon", "sophiag")])
def test_layout(rule: str, layout: str, tmp_path: Path) -> None:
    """tests/training compares muon in fp32 arithmetic and sophiag with its second gradient."""
    tied = {"TIE_EMBEDDINGS": "1"} if "tied" in layout else {}
    common = {"OPT": rule, "LR": "0.01", "RUN_DIR": str(tmp_path / "one"), **tied}
    expected, _ = run(front.train_and_save, 1, common, 5)[0]
    variables = {**common, **LAYOUTS[layout], "RUN_DIR": str(tmp_path / "many")}
    for curve, _ in run(front.train_and_save, 4, variables, 5):
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, expected, strict=True):
            assert loss == pytest.approx(expected_loss, abs=2e-5)
            assert norm == pytest.approx(expected_norm, rel=2e-5)


@pytest.mark.parametrize("rule", accepted())
def test_resume_bit_for_bit(rule: str, tmp_path: Path) -> None:
    whole = {"OPT": rule, "LR": "0.01", "RUN_DIR": str(tmp_path / "whole"), "WORLD_SIZE": "2"}
    expected, _ = run(front.train_and_save, 2, whole, 6)[0]
    parts = {**whole, "RUN_DIR": str(tmp_path / "parts")}
    first, _ = run(front.train_and_save, 2, parts, 3)[0]
    second = run(front.resume_and_train, 2, parts, 3)[0]
    assert first + second == expected
