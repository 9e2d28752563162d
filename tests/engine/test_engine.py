"""The door itself: rate, norm, clip, loss scale, evaluation and the end, for both engines."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.distributed as dist

from megatron.engine import Engine, stop_distributed
from megatron.parallel.piece import WEIGHT
from tests.equivalence import front
from tests.equivalence.case import Case
from tests.spawn import run

CASES = [
    Case(dp=2),
    Case(dp=2, zero_stage=2),
    Case(tp=2, zero_stage=3),
    Case(pp=2, tied=True, gas=2),
]
RATE, CLIP = 0.5, 0.3


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's fp32 weights, each element on one rank."""
    pieces = engine.shards().pieces()
    return {f"{p.name} {p.start}": p.tensors[WEIGHT].clone() for p in pieces}


def moved(engine: Engine, before: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of all ranks' weights from those of before."""
    now = weights(engine)
    square = sum((now[name] - before[name]).double().square().sum() for name in now)
    total = torch.as_tensor(square, dtype=torch.float64)
    dist.all_reduce(total)
    return math.sqrt(total)


def batch(variables: dict[str, str], engine: Engine, step: int) -> list:
    config = front.run_config(variables)
    return list(front.micro_batches(config, engine.groups, step))


def printed(variables: dict[str, str]) -> list[str]:
    """What is logged at DEBUG while the engine is built."""
    texts: list[str] = []

    class Texts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    logger, handler = logging.getLogger("megatron.engine"), Texts()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    front.build(front.run_config(variables))
    logger.removeHandler(handler)
    logger.setLevel(level)
    return texts


@pytest.mark.parametrize("case", [Case(), Case(pp=2, gas=2)])
def test_the_model_is_printed_where_it_is_asked_for(case: Case) -> None:
    for texts in run(printed, case.world, case.variables()):
        assert any("ColumnParallelLinear" in text for text in texts)


def distances(variables: dict[str, str]) -> list[tuple[float, float]]:
    """(distance moved, gradient norm) of a step, of one without clipping, and of one at rate 0."""
    engine = front.build(front.run_config(variables), large=True)
    result = []
    for step in range(3):
        before = weights(engine)
        engine.set_learning_rate(0.0 if step == 2 else RATE)
        if step == 1:
            with engine.unclipped():
                engine.train_batch(batch(variables, engine, step))
        else:
            engine.train_batch(batch(variables, engine, step))
        assert engine.step_applied
        result.append((moved(engine, before), float(engine.gradient_norm())))
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_goes_as_far_as_rate_norm_and_clip_say(case: Case) -> None:
    """Plain SGD moves the weights by rate times the clipped norm: the length needs no reference."""
    for (clipped, norm), (free, free_norm), (still, _) in run(
        distances, case.world, case.variables()
    ):
        assert norm > CLIP and free_norm > CLIP
        assert clipped == pytest.approx(RATE * CLIP, rel=1e-4)
        assert free == pytest.approx(RATE * free_norm, rel=1e-4)
        assert still == 0.0


def evaluated(variables: dict[str, str]) -> tuple[float, float, float]:
    """Loss of an evaluation, how far it moved the weights, and the loss of a step after it."""
    engine = front.build(front.run_config(variables), large=True)
    engine.set_learning_rate(RATE)
    engine.train_batch(batch(variables, engine, 0))
    before = weights(engine)
    loss = float(engine.eval_batch(batch(variables, engine, 1)))
    distance = moved(engine, before)
    assert engine.module.training
    return loss, distance, float(engine.train_batch(batch(variables, engine, 1)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_evaluation_leaves_the_weights_alone(case: Case) -> None:
    for loss, distance, after in run(evaluated, case.world, case.variables()):
        assert distance == 0.0
        assert loss == pytest.approx(after, abs=1e-6)


def scales(variables: dict[str, str]) -> dict[str, object]:
    """Two steps whose fp16 gradients overflow, the scaler's numbers put back, and a step."""
    engine = front.build(front.run_config(variables))
    engine.set_learning_rate(0.01)
    first = engine.shards().scaler_state()
    assert engine.loss_scale == first["cur_scale"]
    engine.shards().load_scaler_state({**first, "cur_scale": 2.0**60})
    before = weights(engine)
    applied = []
    for step in range(2):
        engine.train_batch(batch(variables, engine, step))
        applied.append(engine.step_applied)
        assert float(engine.gradient_norm()) == math.inf
    distance, lowered = moved(engine, before), engine.loss_scale
    engine.shards().load_scaler_state({**first, "cur_scale": 256.0})
    engine.train_batch(batch(variables, engine, 2))
    applied.append(engine.step_applied)
    after = engine.shards().scaler_state()
    return {"applied": applied, "distance": distance, "lowered": lowered, "after": after}


def test_a_gradient_that_overflows_is_not_applied_and_lowers_the_scale() -> None:
    for found in run(scales, 2, Case(dp=2, dtype="fp16", zero_stage=2).variables()):
        assert found["applied"] == [False, False, True]
        assert found["distance"] == 0.0
        assert found["lowered"] == 2.0**59  # hysteresis 2: the second overflow halves it
        assert found["after"]["cur_scale"] == 256.0


def without_scaler(variables: dict[str, str]) -> tuple[float, dict[str, float]]:
    engine = front.build(front.run_config(variables))
    engine.shards().load_scaler_state({"cur_scale": 2.0})  # of a run that was in fp16 before
    return engine.loss_scale, engine.shards().scaler_state()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_fp16_has_a_scaler(dtype: str) -> None:
    assert run(without_scaler, 1, Case(dtype=dtype).variables()) == [(1.0, {})]


def closed(variables: dict[str, str]) -> bool:
    """A run to its end; all is done twice."""
    engine = front.build(front.run_config(variables))
    engine.train_batch(batch(variables, engine, 0))
    for _ in range(2):
        engine.close()
    for _ in range(2):
        stop_distributed()
    return dist.is_initialized()


@pytest.mark.parametrize(
    "settings",
    [
        Case(dp=2).variables(),
        Case(dp=2, zero_stage=3).variables(),
        Case(pp=2, gas=2, dtype="bf16").variables(),
        Case(pp=2, gas=4, tied=True).variables() | {"PIPELINE_SCHEDULE": "dualpipev"},
    ],
    ids=["zero1", "zero3", "pp2", "dualpipev"],
)
def test_closing_ends_engine_and_groups_and_may_be_done_twice(settings: dict[str, str]) -> None:
    assert run(closed, 2, settings) == [False, False]
