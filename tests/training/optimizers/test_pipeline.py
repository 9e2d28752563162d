"""Update rules through the engine and the real model: pipeline stages change nothing either."""

from __future__ import annotations

import dataclasses

import pytest

from megatron.config.schema import RunConfig
from megatron.engine import Engine
from megatron.training.optimizers.sophia import SophiaG, hessian_step, label_draws
from tests.equivalence import front
from tests.equivalence.case import Case
from tests.equivalence.front import Curve
from tests.spawn import run
from tests.training.optimizers.cases import newton_schulz_in_fp32

RATES = {"muon": "1e-3", "adafactor": "1e-2", "sophiag": "1e-3"}
STEPS = 4


def _curve(variables: dict[str, str]) -> Curve:
    """(loss, gradient norm) of each step."""
    config = front.run_config(variables)
    with newton_schulz_in_fp32():
        engine = front.build(config)
        curve = []
        for step in range(STEPS):
            if isinstance(engine.optimizer, SophiaG) and step % 2 == 0:
                _estimate(config, engine, step)
            curve += front.steps(config, engine, step, step + 1)
        return curve


def _estimate(config: RunConfig, engine: Engine, step: int) -> None:
    """A step on drawn labels, for the diagonal."""
    train, length, dp = config.train, config.model.seq_length, engine.groups.dp
    batches = []
    for number, (tokens, _) in enumerate(front.micro_batches(config, engine.groups, step)):
        first = (number * dp.size + dp.rank) * train.micro_batch_size
        samples = [*range(first, first + train.micro_batch_size)]
        batches.append((tokens, label_draws(7, step, samples, length)))
    assert isinstance(engine.optimizer, SophiaG)
    with engine.unclipped(), hessian_step(engine.optimizer, train.global_batch_size * length):
        engine.train_batch(batches)


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, optimizer="muon", tied=True, gas=2),
        Case(tp=2, pp=2, optimizer="adafactor", tied=True, gas=2),
        Case(pp=2, dp=2, optimizer="sophiag", gas=2),
    ],
    ids=lambda case: f"{case.optimizer}-{case}",
)
def test_losses_are_those_of_one_process(case: Case) -> None:
    rate = {"LR": RATES[case.optimizer]}
    one = dataclasses.replace(case, tp=1, pp=1, dp=1)
    (expected,) = run(_curve, 1, one.variables() | rate)
    for curve in run(_curve, case.world, case.variables() | rate):
        for pair, wanted in zip(curve, expected, strict=True):
            assert pair == pytest.approx(wanted, abs=3e-6)
