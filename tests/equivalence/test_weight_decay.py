"""A weight decay that changes with the step: a run of one-step pieces of constant weight decay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.equivalence.test_growing_batch import curve

STYLE = {
    "WEIGHT_DECAY_INCR_STYLE": "linear", "START_WEIGHT_DECAY": "0", "END_WEIGHT_DECAY": "2",
    "TRAIN_ITERS": "3",
}  # fmt: skip
PIECES = [("0", "1"), ("1", "2"), ("2", "3")]  # (WEIGHT_DECAY, its last step)
LAYOUTS = {"zero1": {}, "tp2": {"TP": "2"}, "zero3": {"ZERO_STAGE": "3", "WORLD_SIZE": "2"}}


@pytest.mark.parametrize(("rule", "layout"), [("adamw", "zero1"), ("muon", "tp2")])
def test_it_is_applied_to_its_step(rule: str, layout: str, tmp_path: Path) -> None:
    pieces_of(rule, layout, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["adamw", "lamb", "adafactor", "sophiag", "sgd"])
def test_it_is_applied_to_its_step_long(rule: str, layout: str, tmp_path: Path) -> None:
    if layout != "zero3" or rule not in ("lamb", "adafactor"):  # they need whole matrices
        pieces_of(rule, layout, tmp_path)


def pieces_of(rule: str, layout: str, folder: Path) -> None:
    ranks = 1 if layout == "zero1" else 2
    common = {"OPT": rule, "LR": "0.05", "EVAL_INTERVAL": "0", **LAYOUTS[layout]}
    whole = curve(ranks, folder / "whole", **common, **STYLE)
    found = []
    for decay, last in PIECES:
        settings = {**common, "WEIGHT_DECAY": decay, "TRAIN_ITERS": last}
        found += curve(ranks, folder / "pieces", **settings)
    assert whole == found
    none = curve(ranks, folder / "none", **common, WEIGHT_DECAY="0", TRAIN_ITERS="3")
    assert whole[2] != none[2]
