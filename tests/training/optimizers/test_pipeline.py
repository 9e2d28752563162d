"""Update rules through the engine and the real model: pipeline stages change nothing either."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron.config.layout import Layout
from megatron.config.pipeline_stages import stage_bounds
from megatron.config.schema import OptimizerConfig
from megatron.engine import Engine, EngineOptions, start_distributed
from megatron.parallel.groups import make_groups
from megatron.training.optimizers.rules import make_optimizer
from megatron.training.optimizers.sophia import (
    SophiaG,
    hessian_step,
    label_draws,
    with_sampled_labels,
)
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer
from tests.equivalence.training import (
    GLOBAL_BATCH,
    SEQ_LENGTH,
    VOCAB_SIZE,
    Case,
    deepspeed_settings,
    mean_loss,
    micro_batches,
    model_layers,
)
from tests.spawn import run
from tests.training.optimizers.cases import newton_schulz_in_fp32

RATES = {"muon": 1e-3, "adafactor": 1e-2, "sophiag": 1e-3}


def _losses(case: Case) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    with newton_schulz_in_fp32():
        return _train(case)


def _train(case: Case) -> list[tuple[float, float]]:
    rank = dist.get_rank()
    start_distributed("gloo", rank, case.world, rank, "", 60)
    groups = make_groups(Layout(case.tp, case.pp, case.dp))
    settings = OptimizerConfig(optimizer=case.optimizer, learning_rate=RATES[case.optimizer])
    engine = Engine(
        model_layers(case, groups),
        with_sampled_labels(mean_loss(groups), groups.tp, VOCAB_SIZE),
        partial(make_optimizer, settings),
        groups,
        EngineOptions(
            deepspeed_config=deepspeed_settings(case),
            gradient_accumulation_steps=case.gas,
            stage_bounds=stage_bounds((4 // case.pp,) * case.pp),
            device=torch.device("cpu"),
        ),
    )
    if isinstance(engine.optimizer, WholeMatrixOptimizer):
        named = engine.module.named_parameters()
        engine.optimizer.bind(named, groups.dp, groups.tp, engine.zero_optimizer, VOCAB_SIZE)
    result = []
    for step in range(case.steps):
        batches = list(micro_batches(case, groups, step))
        if isinstance(engine.optimizer, SophiaG) and step % 2 == 0:
            each = GLOBAL_BATCH // (case.gas * case.dp)
            first = [(m * case.dp + groups.dp.rank) * each for m in range(case.gas)]
            draws = [label_draws(7, step, [*range(i, i + each)], SEQ_LENGTH) for i in first]
            tokens = [tokens for tokens, _ in batches]
            with hessian_step(engine.optimizer, engine.zero_optimizer, GLOBAL_BATCH * SEQ_LENGTH):
                engine.train_batch(zip(tokens, draws, strict=True))
        loss = float(engine.train_batch(batches))
        result.append((loss, float(engine.gradient_norm())))
    return result


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, optimizer="muon", tied=True, gas=2, steps=4),
        Case(tp=2, pp=2, optimizer="adafactor", tied=True, gas=2, steps=4),
        Case(pp=2, dp=2, optimizer="sophiag", gas=2, steps=4),
    ],
    ids=lambda case: f"{case.optimizer}-{case}",
)
def test_losses_are_those_of_one_process(case: Case) -> None:
    (expected,) = run(_losses, 1, dataclasses.replace(case, tp=1, pp=1, dp=1))
    for losses in run(_losses, case.world, case):
        for pair, wanted in zip(losses, expected, strict=True):
            assert pair == pytest.approx(wanted, abs=3e-6)
