"""Weights that a checkpoint brings are not drawn first, and are read without a second copy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import tensors
from megatron.config.errors import ConfigError
from megatron.parallel import init
from megatron.parallel.piece import WEIGHT, Piece
from megatron.training.first_weights import complete
from megatron.training.resume import find_source, resume
from tests.engine import curves
from tests.equivalence import front
from tests.spawn import run

ADAMW = {"OPT": "adamw", "LR": "0.01"}
WIDE = {"HIDDEN": "512", "FFN_HIDDEN_SIZE": "1536", "MICRO_BATCH": "1", "GLOBAL_BATCH": "1"}


def megabytes(what: str) -> float:
    """VmRSS, what this process has in memory, or VmHWM, the most that it has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def start(variables: dict[str, str], draws: bool) -> tuple[float, float, float, int]:
    """Megabytes before the engine is built, after it, and at most with the resume; parameters."""
    config, control = front.run_config(variables), front.make_control()
    if draws:
        engine = front.build(config)
        front.steps(config, engine, 0, 1)
        front.save(config, engine, 1, control)
        return 0.0, 0.0, 0.0, 0
    tensors.MOST_MAPPED = 1 << 22
    source = find_source(config, control)
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    engine = front.build(config, source=source, poisoned=False)
    built = megabytes("VmRSS")
    resume(config, engine, None, control, source)
    count = sum(parameter.numel() for parameter in engine.module.parameters())
    return before, built, megabytes("VmHWM"), count


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_a_resume_holds_no_second_copy(dtype: str, tmp_path: Path) -> None:
    """fp32: weights and two moments have 12 bytes a parameter; half as much again is no copy."""
    variables = {**ADAMW, **WIDE, "DTYPE": dtype, "RUN_DIR": str(tmp_path)}
    run(start, 1, variables, True)
    ((before, built, most, count),) = run(start, 1, variables, False)
    weights = {"fp32": 0, "bf16": 2 + 4}[dtype]  # what the engine copies of what is not there yet
    assert built - before < (weights + 1) * count / 2**20, "fp32 weights are memory not yet used"
    assert most - before < ({"fp32": 12, "bf16": 14}[dtype] + 6) * count / 2**20


def drawn(variables: dict[str, str]) -> int:
    """Blocks of weights that a start draws."""
    blocks, draw, control = list[str](), init._draw_block, front.make_control()

    def counted(seed: int, name: str, *shape: object) -> torch.Tensor:
        blocks.append(name)
        return draw(seed, name, *shape)  # type: ignore[arg-type]

    init._draw_block = counted
    config = front.run_config(variables)
    engine = front.build(config, source=find_source(config, control))
    if blocks:
        front.save(config, engine, 1, control)
    return len(blocks)


@pytest.mark.parametrize(
    "layout",
    [{}, {"PP": "2"}, {"WORLD_SIZE": "2", "ZERO_STAGE": "3"}, {"ENGINE": "deepspeed"}],
    ids=str,
)
def test_no_engine_draws_what_is_read(layout: dict[str, str], tmp_path: Path) -> None:
    variables = {**ADAMW, **layout, "RUN_DIR": str(tmp_path)}
    assert min(run(drawn, front.world(variables), variables)) > 0
    assert max(run(drawn, front.world(variables), variables)) == 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["sp2", "dualpipev", "mics", "hpz-tp2", "host"])
def test_layouts_of_their_own_resume_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Others: tests/equivalence/test_resume.py. What is not read is NaN there and here."""
    variables = curves.CASES[name] | ADAMW | {"RUN_DIR": str(tmp_path / "parts")}
    ranks, alone = front.world(variables), variables | {"RUN_DIR": str(tmp_path / "whole")}
    whole = run(front.train, ranks, alone, 4, True, timeout=120)
    first = run(front.train_and_save, ranks, variables, 2, True, timeout=120)
    then = run(front.resume_and_train, ranks, variables, 2, True, timeout=120)
    assert [a + b for (a, _), b in zip(first, then, strict=True)] == whole


def test_what_a_folder_lacks_is_refused_by_name() -> None:
    piece = Piece("3.attention.q.weight", (4,), None, 0, 1, 0, {WEIGHT: torch.zeros(4)}, {})

    def read(piece: Piece) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        raise KeyError(piece.name)

    with pytest.raises(ConfigError, match=r"folder lacks 3\.attention\.q\.weight, or a part"):
        complete(read, Path("folder"), ConfigError)(piece)
