"""A batch that grows through the engine: a run of pieces of constant batch, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.equivalence import growing
from tests.spawn import run

COMMON = {
    "GLOBAL_BATCH": "8", "MICRO_BATCH": "2", "OPT": "adamw", "LR": "3e-3", "WEIGHT_DECAY": "0.1",
    "LR_DECAY_STYLE": "constant", "LR_WARMUP_FRAC": "0", "SAVE_INTERVAL": "0",
    "EVAL_INTERVAL": "3", "EVAL_ITERS": "1",
}  # fmt: skip
RAMP = {"RAMPUP_BATCH_SIZE": "2 2 16", "TRAIN_ITERS": "8"}
PIECES = [("2", "3"), ("4", "5"), ("6", "6"), ("8", "8")]  # (GLOBAL_BATCH, its last step)
DP2 = {"RAMPUP_BATCH_SIZE": "4 4 16", "WORLD_SIZE": "2"}
DP2_PIECES = [("4", "4"), ("8", "8")]


def curve(ranks: int, folder: Path, **variables: str) -> list[tuple[Any, ...]]:
    """(step, batch, samples, loss, norm) of each step, and the loss of each evaluation."""
    records = run(growing.trained, ranks, {**COMMON, **variables, "RUN_DIR": str(folder)})[0]
    keys = ("iteration", "global_batch_size", "consumed_samples", "loss", "grad_norm")
    return [tuple(record.get(key) for key in keys) for record in records if "loss" in record]


def steps(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Without the evaluations."""
    return [row for row in found if row[1] is not None]


def pieces(ranks: int, folder: Path, sizes: list[tuple[str, str]], **variables: str) -> Any:
    """The same steps as runs of a constant batch, each resumed from the one before."""
    found = []
    for batch, last in sizes:
        settings = {**variables, "GLOBAL_BATCH": batch, "TRAIN_ITERS": last}
        found += steps(curve(ranks, folder, **settings))
    return found


def test_the_run_is_its_pieces_bit_for_bit_and_resumes(tmp_path: Path) -> None:
    whole = curve(1, tmp_path / "whole", **RAMP)
    assert [row[1] for row in steps(whole)] == [2, 2, 2, 4, 4, 6, 8, 8]
    assert steps(whole) == pieces(1, tmp_path / "pieces", PIECES)
    first = curve(1, tmp_path / "parts", **{**RAMP, "TRAIN_ITERS": "4"})
    again = curve(1, tmp_path / "parts", **RAMP)
    assert steps(first) + steps(again) == steps(whole)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """One process, micro-batches of two, SGD with a binding clip."""
    return curve(
        1, tmp_path_factory.mktemp("alone"), **RAMP, OPT="sgd", LR="0.1", TIE_EMBEDDINGS="1"
    )


def assert_equal(
    found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], within: float
) -> None:
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        values = [value for value in row[3:] if value is not None]
        assert values == pytest.approx([v for v in wanted[3:] if v is not None], abs=within)


LAYOUTS = {
    "pp2-tied": {"PP": "2"},
    "dp2-zero3": {"WORLD_SIZE": "2", "MICRO_BATCH": "1", "ZERO_STAGE": "3"},
}
LONG = {
    "tp2": {"TP": "2"},
    "sp2": {"SP": "2"},
    "dp2-zero1": {"WORLD_SIZE": "2", "MICRO_BATCH": "1"},
    "dp2-zero2": {"WORLD_SIZE": "2", "MICRO_BATCH": "1", "ZERO_STAGE": "2"},
    "dp2-host": {"WORLD_SIZE": "2", "MICRO_BATCH": "1", "ZERO_STAGE": "2", "CPU_OPTIMIZER": "1"},
    "mics": {"WORLD_SIZE": "2", "MICRO_BATCH": "1", "ZERO_STAGE": "3", "MICS_SHARD_SIZE": "2"},
    "pp2-dp2": {"PP": "2", "WORLD_SIZE": "4", "MICRO_BATCH": "1"},
    "tp2-pp2": {"PP": "2", "TP": "2"},
    "pp4": {"PP": "4"},
}


def layout_case(layout: dict[str, str], expected: Any, folder: Path) -> None:
    ranks = int(layout.get("WORLD_SIZE", 0)) or 1
    if "WORLD_SIZE" not in layout:
        for axis in ("TP", "PP", "SP"):
            ranks *= int(layout.get(axis, 1))
    settings = {**RAMP, "OPT": "sgd", "LR": "0.1", "TIE_EMBEDDINGS": "1", **layout}
    assert_equal(curve(ranks, folder, **settings), expected, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, alone: Any, tmp_path: Path) -> None:
    layout_case(LAYOUTS[layout], alone, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("layout", LONG)
def test_layout_long(layout: str, alone: Any, tmp_path: Path) -> None:
    layout_case(LONG[layout], alone, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", ["1", "3"])
def test_pieces_in_lower_precision(dtype: str, stage: str, tmp_path: Path) -> None:
    """Bit for bit: gradients of one, two or four micro-batches are scaled alike."""
    chosen = {"DTYPE": dtype, "ZERO_STAGE": stage, **DP2}
    whole = steps(curve(2, tmp_path / "whole", TRAIN_ITERS="8", **chosen))
    plain = {name: value for name, value in chosen.items() if name != "RAMPUP_BATCH_SIZE"}
    assert whole == pieces(2, tmp_path / "pieces", DP2_PIECES, **plain)


@pytest.mark.long
def test_dualpipev(tmp_path: Path) -> None:
    layout = {"PP": "2", "PIPELINE_SCHEDULE": "dualpipev", "MICRO_BATCH": "1"}
    chosen = {"RAMPUP_BATCH_SIZE": "4 4 12", "TRAIN_ITERS": "6", "OPT": "sgd", "LR": "0.1"}
    expected = curve(1, tmp_path / "alone", **chosen)
    assert_equal(curve(2, tmp_path / "many", **chosen, **layout), expected, 1e-5)


@pytest.mark.long
def test_sophia_estimates_on_the_batch_of_its_step(tmp_path: Path) -> None:
    chosen = {**RAMP, "OPT": "sophiag", "SOPHIA_HESSIAN_INTERVAL": "2", "SOPHIA_RHO": "1e4"}
    whole = steps(curve(1, tmp_path / "whole", **chosen))
    plain = {name: value for name, value in chosen.items() if name not in RAMP}
    assert whole == pieces(1, tmp_path / "pieces", PIECES, **plain)
