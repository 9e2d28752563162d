"""Norms, zeros and optimizer states as logged: in any layout those of plain torch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.equivalence import probed
from tests.spawn import run

COMMON = {"OPT": "adamw", "LR": "3e-3"}
LAYOUTS = {
    "one": {},
    "tp2-dp2-zero1": {"TP": "2", "WORLD_SIZE": "4"},
    "dp2-zero3": {"ZERO_STAGE": "3", "WORLD_SIZE": "2"},
    "tp2-pp2-tied": {"TP": "2", "PP": "2", "TIE_EMBEDDINGS": "1"},
}
LONG = {
    "dp2-zero2": {"ZERO_STAGE": "2", "WORLD_SIZE": "2"},
    "dp2-zero0": {"ZERO_STAGE": "0", "WORLD_SIZE": "2"},
    "tp2-dp2-zero3": {"TP": "2", "ZERO_STAGE": "3", "WORLD_SIZE": "4"},
    "mics": {"ZERO_STAGE": "3", "MICS_SHARD_SIZE": "2", "WORLD_SIZE": "4", "MICRO_BATCH": "1"},
    "sp2": {"SP": "2"},
    "pp4": {"PP": "4"},
    "tp4-sequence": {"TP": "4", "SEQUENCE_PARALLEL": "1"},
    "host": {"CPU_OPTIMIZER": "1", "WORLD_SIZE": "2"},
}
PLAIN: dict[bool, Any] = {}


def compare(layout: dict[str, str]) -> None:
    tied = "TIE_EMBEDDINGS" in layout
    if tied not in PLAIN:
        same = {"TIE_EMBEDDINGS": layout["TIE_EMBEDDINGS"]} if tied else {}
        PLAIN[tied] = run(probed.plain, 1, {**COMMON, **same})[0]
    axes = [int(layout.get(axis, 1)) for axis in ("TP", "PP", "SP")]
    ranks = int(layout.get("WORLD_SIZE", axes[0] * axes[1] * axes[2]))
    for found in run(probed.probed, ranks, {**COMMON, **layout}):
        for step, wanted in zip(found, PLAIN[tied], strict=True):
            assert step["params_norm"] == pytest.approx(wanted["params_norm"], rel=1e-6)
            assert step["num_zeros"] == wanted["num_zeros"]
            assert tied or step["num_zeros"] > 0
            assert step["optimizer_states"] == pytest.approx(wanted["optimizer_states"], rel=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str) -> None:
    compare(LAYOUTS[layout])


@pytest.mark.long
@pytest.mark.parametrize("layout", LONG)
def test_layout_long(layout: str) -> None:
    compare(LONG[layout])


@pytest.mark.parametrize("rule", ["muon", "sophiag", "sgd"])
def test_states_of_other_rules(rule: str) -> None:
    """Whole-matrix states count once; a rule without a variance has none on the dashboard."""
    one = run(probed.probed, 1, {"OPT": rule, "LR": "0.01"})[0][-1]["optimizer_states"]
    two = run(probed.probed, 2, {"OPT": rule, "LR": "0.01", "WORLD_SIZE": "2"})
    tolerance = 3e-3 if rule == "muon" else 1e-3  # torch's Muon orthogonalises in bf16
    for found in two:
        assert found[-1]["optimizer_states"] == pytest.approx(one, rel=tolerance)
    assert ("variance_l2" in one) == (rule == "muon")  # AdamW's, of embedding, head and norms
    assert ("momentum_l2" in one) == (rule != "sgd")
