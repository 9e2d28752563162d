"""Pipeline schedules and cuts give the one-process run, and their bubble is measured."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.state import RunState
from megatron.engine import clock as clock_file
from megatron.engine.bubble import StageClock
from megatron.model.block import Block
from megatron.parallel.control import ALONE, make_control
from megatron.parallel.groups import Axis
from megatron.training.device import detect
from megatron.training.generate import Sampling, generate
from megatron.training.meter import Meter
from megatron.training.probes import Probes
from megatron.training.trainer import Trainer
from tests.equivalence import front
from tests.spawn import run

COMMON = {"GLOBAL_BATCH": "16", "LR": "0.5", "CLIP_GRAD": "0.3", "NLAYERS": "8"}
DUALPIPEV = {"PIPELINE_SCHEDULE": "dualpipev", "PP": "2", "GRAD_ACC_STEPS": "4", "MICRO_BATCH": "4"}
STEPS = 6

LAYOUTS = {
    "dualpipev": DUALPIPEV,
    "dualpipev-gas8": {**DUALPIPEV, "GRAD_ACC_STEPS": "8", "MICRO_BATCH": "2"},
    "dualpipev-dp2": {**DUALPIPEV, "WORLD_SIZE": "4", "MICRO_BATCH": "2"},
    "dualpipev-tp2": {**DUALPIPEV, "TP": "2"},
    "dualpipev-pp4": {**DUALPIPEV, "PP": "4", "GRAD_ACC_STEPS": "8", "MICRO_BATCH": "2"},
    "dualpipev-cuts": {**DUALPIPEV, "PIPELINE_CUTS": "3,1,2,2"},
    "dualpipev-recompute": {
        **DUALPIPEV,
        "USE_ACTIVATION_CHECKPOINTING": "1",
        "ACT_CKPT_NUM_LAYERS": "2",
    },
    "recompute": {  # runs of three blocks and of one on each stage
        "PP": "2",
        "TP": "2",
        "GRAD_ACC_STEPS": "4",
        "MICRO_BATCH": "4",
        "USE_ACTIVATION_CHECKPOINTING": "1",
        "ACT_CKPT_NUM_LAYERS": "3",
    },
    "pp4": {"PP": "4", "GRAD_ACC_STEPS": "4", "MICRO_BATCH": "4"},
    "pp4-offload": {"PP": "4", "GRAD_ACC_STEPS": "4", "MICRO_BATCH": "4", "CPU_OPTIMIZER": "1"},
    "cuts": {"PP": "2", "PIPELINE_CUTS": "6,2", "GRAD_ACC_STEPS": "2", "MICRO_BATCH": "8"},
    "head-alone": {"PP": "2", "PIPELINE_CUTS": "8,0", "GRAD_ACC_STEPS": "2", "MICRO_BATCH": "8"},
}
CASES = [(layout, tied) for layout in LAYOUTS for tied in "01"]
QUICK = [
    ("pp4", "1"),
    ("dualpipev", "1"),
    ("dualpipev-gas8", "0"),
    ("cuts", "1"),
    ("head-alone", "0"),
    ("recompute", "1"),
]


def train(variables: dict[str, str]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; what the tests run on every rank."""
    config = front.run_config(variables)
    return front.steps(config, front.build(config), 0, STEPS)


@cache
def one_process(tied: str) -> list[tuple[float, float]]:
    return run(train, 1, {**COMMON, "MICRO_BATCH": "16", "TIE_EMBEDDINGS": tied})[0]


def check(layout: str, tied: str) -> None:
    variables = {**COMMON, **LAYOUTS[layout], "TIE_EMBEDDINGS": tied}
    for curve in run(train, front.world(variables), variables, timeout=60):
        for (loss, norm), (wanted, wanted_norm) in zip(curve, one_process(tied), strict=True):
            assert loss == pytest.approx(wanted, abs=1e-5)
            assert norm == pytest.approx(wanted_norm, abs=1e-5)


def test_the_clip_binds() -> None:
    """Else a wrong norm would not be seen in the losses."""
    for tied in "01":
        assert min(norm for _, norm in one_process(tied)) > 0.3


@pytest.mark.parametrize(("layout", "tied"), QUICK)
def test_layout(layout: str, tied: str) -> None:
    check(layout, tied)


@pytest.mark.long
@pytest.mark.parametrize(("layout", "tied"), [case for case in CASES if case not in QUICK])
def test_layout_long(layout: str, tied: str) -> None:
    check(layout, tied)


# --- Save, load, evaluation and sampling with two stages a rank -----------------------------------

SAVED = {**COMMON, "OPT": "adamw", "LR": "0.01", "TIE_EMBEDDINGS": "1"}


def test_dualpipev_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = {**SAVED, **DUALPIPEV, "RUN_DIR": str(tmp_path / "whole")}
    expected, _ = run(front.train_and_save, 2, whole, 4)[0]
    parts = {**whole, "RUN_DIR": str(tmp_path / "parts")}
    first, _ = run(front.train_and_save, 2, parts, 2)[0]
    assert first + run(front.resume_and_train, 2, parts, 2)[0] == expected


@pytest.mark.parametrize("direction", ["from", "to"])
def test_dualpipev_and_one_process_read_each_other(direction: str, tmp_path: Path) -> None:
    one = {**SAVED, "MICRO_BATCH": "16"}
    whole = {**one, "RUN_DIR": str(tmp_path / "one")}
    expected, _ = run(front.train_and_save, 1, whole, 4)[0]
    written, read = ({**SAVED, **DUALPIPEV}, one)[:: 1 if direction == "from" else -1]
    folder = {"RUN_DIR": str(tmp_path / "both")}
    run(front.train_and_save, front.world(written), {**written, **folder}, 2)
    for curve in run(front.resume_and_train, front.world(read), {**read, **folder}, 2):
        for pair, wanted in zip(curve, expected[2:], strict=True):
            assert pair == pytest.approx(wanted, abs=1e-5)


def evaluate_and_sample(variables: dict[str, str]) -> tuple[float, list[int], float]:
    """Losses of an evaluation and of a step after it, and tokens drawn between them."""
    config = front.run_config(variables)
    engine = front.build(config)
    loss = float(engine.eval_batch(front.micro_batches(config, engine.groups, 0)))
    sizes = {"vocab_size": 200, "context": 16}
    tokens = generate(
        engine, [1, 2, 3], 5, sampling=Sampling(temperature=0), control=make_control(), **sizes
    )
    return loss, tokens, front.steps(config, engine, 0, 1)[0][0]


def test_dualpipev_evaluates_and_samples() -> None:
    one = run(evaluate_and_sample, 1, {**COMMON, "MICRO_BATCH": "16"})[0]
    for loss, tokens, after in run(evaluate_and_sample, 2, {**COMMON, **DUALPIPEV}):
        assert tokens == one[1]
        assert (loss, after) == pytest.approx((one[0], one[2]), abs=1e-5)


# --- The bubble -----------------------------------------------------------------------------------


class _Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def two_stages_in_turn() -> tuple[float | None, float | None]:
    """Passes of 1 s and of 3 s on two stages without overlap: together they work half the time."""
    clock = _Clock()
    clock_file.time.perf_counter = clock
    rank = dist.get_rank()
    pp = Axis(dist.group.WORLD, rank, 2, (0, 1))
    stage = StageClock(torch.device("cpu"), pp)
    run_pass = stage.timed(clock.work)
    for _ in range(3):
        with stage:
            for place in (0, 1, 1, 0):  # forward and backward through both
                take = run_pass if place == rank else clock.work
                take((1.0, 3.0)[place])
        run_pass(5.0)  # an evaluation, which counts nowhere
    return stage.bubble(), stage.bubble()


def test_the_bubble_of_stages_that_wait_for_each_other() -> None:
    assert run(two_stages_in_turn, 2) == [(0.5, None)] * 2


def bubble_of(variables: dict[str, str]) -> float | None:
    config = front.run_config(variables)
    engine = front.build(config)
    front.steps(config, engine, 0, 1)
    engine.pipeline_bubble()  # the first step warms up
    front.steps(config, engine, 1, 4)
    return engine.pipeline_bubble()


def test_more_micro_batches_leave_less_of_a_bubble() -> None:
    """The compute is large beside the messages; wide bounds, for the machine may be busy."""
    heavy = {**COMMON, "NLAYERS": "4", "HIDDEN": "128", "SEQ": "128", "PP": "2", "MICRO_BATCH": "1"}
    bubbles = [
        run(bubble_of, 2, {**heavy, "GRAD_ACC_STEPS": str(m), "GLOBAL_BATCH": str(m)})[0]
        for m in (1, 8)
    ]
    assert bubbles[0] > 0.4 and bubbles[1] < bubbles[0]


def test_no_pipeline_has_no_bubble() -> None:
    assert run(bubble_of, 1, {**COMMON, "MICRO_BATCH": "8"}) == [None]


def recorded(variables: dict[str, str]) -> list[dict[str, float]]:
    """The bubbles in the record before any step, and after two."""
    config = front.run_config(variables)
    engine = front.build(config)
    probes = Probes(config, engine, ALONE)
    trainer: Any = SimpleNamespace(engine=engine, probes=probes)
    meter = Meter(config, detect(0, config.train.dtype), partial(Trainer._measured, trainer))
    records = [meter.record(RunState(), 0.1)]
    for loss, norm in front.steps(config, engine, 0, 2):
        meter.step(loss, norm)
    records.append(meter.record(RunState(2, 32, 1024), 0.1))
    return [{k: v for k, v in record.items() if "bubble" in k} for record in records]


def test_a_record_has_the_bubble_beside_the_model() -> None:
    variables = {**COMMON, "PP": "2", "GRAD_ACC_STEPS": "4", "MICRO_BATCH": "4"}
    (before, after), (_, on_the_last_stage) = run(recorded, 2, variables)
    assert before == {} and after == on_the_last_stage
    assert after["pipeline_bubble_model"] == 1 / 5 and 0 < after["pipeline_bubble"] < 1


# --- What a rank holds, and keeps -----------------------------------------------------------------


def blocks_held(variables: dict[str, str]) -> int:
    module = front.build(front.run_config(variables)).module
    return sum(isinstance(part, Block) for part in module.modules())


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"PP": "2"}, [4, 4]),
        ({"PP": "2", "PIPELINE_CUTS": "6,2"}, [6, 2]),
        ({**DUALPIPEV, "PIPELINE_CUTS": "3,1,2,2"}, [3 + 2, 1 + 2]),
    ],
    ids=str,
)
def test_a_rank_holds_the_layers_of_its_cut(settings: dict[str, str], held: list[int]) -> None:
    assert run(blocks_held, 2, {**COMMON, "MICRO_BATCH": "4", **settings}) == held


def calls_of_each_direction(variables: dict[str, str]) -> list[int]:
    module = front.build(front.run_config(variables)).module
    directions = getattr(module, "phase_funcs", [module.forward_funcs])
    return [len(functions) for functions in directions]


def test_dualpipev_recomputes_both_ways() -> None:
    """Runs of two blocks are one call each: 2 + 2 layers out and back, with embedding and norm."""
    variables = {**COMMON, **LAYOUTS["dualpipev-recompute"], "PIPELINE_CUTS": "2,2,2,2"}
    assert run(calls_of_each_direction, 2, variables) == [[2, 2], [1, 1]]


def test_a_stage_keeps_one_input_a_run_of_layers() -> None:
    """Blocks of a stage in runs of three: 3 + 1, with the embedding before or the norm after.

    Runs do not reach over the end of a stage.
    """
    variables = {**COMMON, **LAYOUTS["recompute"], "TP": "1", "PIPELINE_CUTS": "4,4"}
    assert run(calls_of_each_direction, 2, variables) == [[1 + 2], [2 + 1]]
