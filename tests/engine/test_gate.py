"""A refused or not finite step changes nothing, on no rank, under any engine and optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine import Engine
from tests.equivalence import front
from tests.equivalence.case import Case
from tests.spawn import run

ADAM = {"OPT": "adamw", "LR": "0.01"}
SETTINGS = {
    "zero1": Case(dp=2).variables() | ADAM,
    "zero2": Case(dp=2, zero_stage=2, gas=2).variables() | ADAM,
    "deepspeed": Case(dp=2, engine="deepspeed").variables() | ADAM,
    "deepspeed-bf16": Case(dp=2, dtype="bf16", engine="deepspeed").variables() | ADAM,
    "zero3": Case(dp=2, zero_stage=3, gas=2).variables() | ADAM,
    "zero0-bf16": Case(dp=2, zero_stage=0, dtype="bf16").variables() | ADAM,
    "zero2-bf16": Case(dp=2, zero_stage=2, dtype="bf16").variables() | ADAM,
    "zero3-bf16": Case(dp=2, zero_stage=3, dtype="bf16").variables() | ADAM,
    "fp16": Case(dp=2, dtype="fp16").variables() | ADAM,
    "tp2": Case(tp=2, tied=True).variables() | ADAM,
    "tp2-zero3": Case(tp=2, zero_stage=3).variables() | ADAM,
    "pp2": Case(pp=2, gas=2, tied=True).variables() | ADAM,
    "pp2-bf16": Case(pp=2, gas=2, dtype="bf16").variables() | ADAM,
    "dualpipev": Case(pp=2, gas=4).variables() | ADAM | {"PIPELINE_SCHEDULE": "dualpipev"},
    "tp2-pp2-dp2": Case(tp=2, pp=2, dp=2, gas=2).variables() | ADAM,
    "host": Case(dp=2, zero_stage=2).variables() | ADAM | {"CPU_OPTIMIZER": "1"},
    "host-zero3-bf16": Case(dp=2, zero_stage=3, dtype="bf16").variables()
    | ADAM
    | {"CPU_OPTIMIZER": "1"},
    "mics": Case(dp=4, zero_stage=3).variables() | ADAM | {"MICS_SHARD_SIZE": "2"},
    "sgd": Case(dp=2).variables(),
    "muon": Case(dp=2, tp=2).variables() | ADAM | {"OPT": "muon"},
    "adafactor": Case(dp=2).variables() | ADAM | {"OPT": "adafactor"},
    "schedule-free": Case(dp=2).variables() | ADAM | {"OPT": "adamwschedulefree"},
    "sophiag": Case(dp=2).variables() | ADAM | {"OPT": "sophiag"},
}


LONG = {
    "zero2-bf16", "zero3-bf16", "deepspeed-bf16", "tp2-zero3", "pp2-bf16", "dualpipev",
    "tp2-pp2-dp2",
    "host-zero3-bf16", "adafactor", "sophiag", "zero2", "host", "mics", "sgd", "schedule-free",
}  # fmt: skip
ALL = [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in SETTINGS]


def ranks(settings: dict[str, str]) -> int:
    return int(settings["WORLD_SIZE"])


def built(settings: dict[str, str]) -> Engine:
    engine = front.build(front.run_config(settings), large=True)
    scaler = engine.shards().scaler_state()
    engine.shards().load_scaler_state({**scaler, "cur_scale": 256.0} if scaler else {})
    return engine


def state(engine: Engine) -> dict[str, Any]:
    """Everything that a step may change: weights, states, counters, and the model's own weights."""
    values: dict[str, Any] = {"counters": engine.shards().counters()}
    for piece in engine.shards().pieces(owned_only=False):
        values |= {f"{piece.name} {key}": bits(t) for key, t in piece.tensors.items()}
        values |= {f"{piece.name} {key}": number for key, number in piece.scalars.items()}
    values |= {name: bits(p.detach()) for name, p in engine.module.named_parameters()}
    whole = getattr(engine.optimizer, "whole_state", dict)()
    for name, states in whole.items():
        values |= {f"{name} {key}": bits(torch.as_tensor(v)) for key, v in states.items()}
    return values


def bits(value: Tensor) -> bytes:
    """The value as it is in memory, so that a NaN equals itself."""
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def step(engine: Engine, settings: dict[str, str], number: int) -> tuple[float, float]:
    """Takes a step on the samples of `number`."""
    config = front.run_config(settings)
    engine.set_learning_rate(config.optimizer.learning_rate)
    loss = engine.train_batch(front.micro_batches(config, engine.groups, number))
    return float(loss), float(engine.gradient_norm())


def refusing(settings: dict[str, str], first: int) -> dict[str, Any]:
    """Steps with one refused after `first` of them, and the same steps without it."""
    engine = built(settings)
    asked: list[tuple[float, float]] = []

    def gate(loss: Tensor, norm: Tensor | float) -> bool:
        asked.append((float(loss), float(norm)))
        return len(asked) != first + 1

    found: dict[str, Any] = {"seen": [], "applied": []}
    for number in range(first + 2):
        before = state(engine)
        with engine.gated(gate):
            found["seen"].append(step(engine, settings, number))
        found["applied"].append(engine.step_applied)
        if number == first:
            found["changed"] = changes(before, state(engine))
    found["asked"], found["end"] = asked, state(engine)
    found["after"] = step(engine, settings, 0), engine.step_applied  # the gate is gone
    return found


def without(settings: dict[str, str], first: int) -> dict[str, Any]:
    """The steps of `refusing` that were taken."""
    engine = built(settings)
    for number in (*range(first), first + 1):
        step(engine, settings, number)
    return state(engine)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs; states that only the later one has are new."""
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


@pytest.mark.parametrize("name", ALL)
def test_a_refused_step_is_one_that_was_never_taken(name: str) -> None:
    settings = SETTINGS[name]
    world = ranks(settings)
    found = run(refusing, world, settings, 2, timeout=120)
    expected = run(without, world, settings, 2, timeout=120)
    for own, taken in zip(found, expected, strict=True):
        assert own["changed"] == []
        assert own["applied"] == [True, True, False, True]
        assert own["asked"] == own["seen"]  # once a step, and the right numbers
        assert own["asked"] == found[0]["asked"]
        assert own["after"][1]
        assert changes(own["end"], taken) == []


@pytest.mark.parametrize("name", ["zero1", "zero3", "zero0-bf16", "pp2", "muon"])
def test_the_first_step_can_be_refused(name: str) -> None:
    settings = SETTINGS[name]
    found = run(refusing, ranks(settings), settings, 0, timeout=120)
    for own, taken in zip(found, run(without, ranks(settings), settings, 0), strict=True):
        assert own["changed"] == [] and own["applied"] == [False, True]
        assert changes(own["end"], taken) == []


def poisoned(settings: dict[str, str]) -> dict[str, Any]:
    """A step after which one rank's gradient of one weight is NaN, and one after it."""
    engine = built(settings)
    step(engine, settings, 0)
    before = state(engine)
    asked: list[float] = []

    def gate(loss: Tensor, norm: Tensor | float) -> bool:
        asked.append(float(norm))
        return True

    handle = None
    if dist.get_rank() == dist.get_world_size() - 1:
        # Of a replicated weight only the first tensor-parallel rank's gradient is in the norm.
        sharded = (p for p in engine.module.parameters() if hasattr(p, "partition_dim"))
        parameter = next(sharded)
        handle = parameter.register_hook(lambda gradient: gradient * math.nan)
    with engine.gated(gate):
        _, norm = step(engine, settings, 1)
    found = {"applied": engine.step_applied, "norm": norm, "asked": asked}
    found["changed"] = changes(before, state(engine))
    if handle is not None:
        handle.remove()
    step(engine, settings, 2)
    return found | {"then": engine.step_applied, "finite": engine.shards().finite()}


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_on_none(name: str) -> None:
    settings = SETTINGS[name]
    for own in run(poisoned, ranks(settings), settings, timeout=120):
        assert not own["applied"] and own["changed"] == [], own
        assert not math.isfinite(own["norm"]) and own["asked"] == []
        assert own["then"] and own["finite"]


def at_the_lowest_scale(settings: dict[str, str]) -> list[tuple[bool, float]]:
    """(applied, scale) of steps whose gradient is NaN where the scaler has no lower scale."""
    engine = built(settings)
    scaler = engine.shards().scaler_state()
    engine.shards().load_scaler_state({**scaler, "cur_scale": 1.0, "cur_hysteresis": 1})
    weight = next(p for p in engine.module.parameters() if hasattr(p, "partition_dim"))
    weight.register_hook(lambda gradient: gradient * math.nan)
    found = []
    for number in range(3):
        step(engine, settings, number)
        found.append((engine.step_applied, engine.loss_scale))
    return found


@pytest.mark.parametrize("stage", ["1", "3"])
def test_fp16_at_its_lowest_scale_skips_and_goes_on(stage: str) -> None:
    """DeepSpeed would raise a bare Exception; MAX_BAD_STEPS ends such a run."""
    settings = SETTINGS["fp16"] | {"ZERO_STAGE": stage}
    assert run(at_the_lowest_scale, 2, settings) == [[(False, 1.0)] * 3] * 2


def blown_up(settings: dict[str, str]) -> list[bool]:
    """Whether the states are finite before and after a step at a rate beyond fp32."""
    engine = built(settings)
    step(engine, settings, 0)
    before = engine.shards().finite()
    engine.set_learning_rate(math.inf)
    config = front.run_config(settings)
    engine.train_batch(front.micro_batches(config, engine.groups, 1))
    return [before, engine.shards().finite()]


@pytest.mark.parametrize("name", ["zero1", "zero3", "zero0-bf16", "pp2", "host", "sgd"])
def test_weights_that_overflowed_are_found(name: str) -> None:
    found = run(blown_up, ranks(SETTINGS[name]), SETTINGS[name])
    assert all(before for before, _ in found) and not all(after for _, after in found)
