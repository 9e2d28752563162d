"""Both kinds of sequence parallelism give the losses and gradient norms of one process."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.parallel.control import make_control
from megatron.training.generate import Sampling, generate
from tests.equivalence import front
from tests.equivalence.case import Case, curves, resumed, saved
from tests.equivalence.test_layouts import check
from tests.spawn import run

ULYSSES: list[dict[str, Any]] = [
    *({"sp": 2, "zero_stage": stage} for stage in (1, 2, 3)),
    *({"sp": 2, "tp": 2, "zero_stage": stage} for stage in (1, 2, 3)),
    *({"sp": 2, "dp": 2, "zero_stage": stage} for stage in (1, 2, 3)),
    {"sp": 4},
    {"sp": 2, "pp": 2},
]
MEGATRON: list[dict[str, Any]] = [
    *({"tp": 2, "zero_stage": stage} for stage in (1, 2, 3)),
    {"tp": 4},
    *({"tp": 2, "dp": 2, "zero_stage": stage} for stage in (2, 3)),
    {"tp": 2, "pp": 2},
    {"tp": 2, "sp": 2},
    {"tp": 2, "sp": 2, "zero_stage": 3},
]
LAYOUTS = [*ULYSSES, *({**layout, "sequence_parallel": True} for layout in MEGATRON)]
FEWER_KEYS: list[dict[str, Any]] = [
    {"sp": 4, "kv_heads": 2},
    {"sp": 4, "kv_heads": 1, "zero_stage": 3},
    {"sp": 2, "tp": 2, "kv_heads": 2},
]

MATRIX = [
    *(
        Case(**layout, tied=tied, gas=gas)
        for layout in LAYOUTS
        for tied, gas in itertools.product((False, True), (1, 4))
    ),
    *(
        Case(**layout, tied=tied, gas=gas, dtype="bf16")
        for layout in LAYOUTS
        for tied, gas in ((False, 1), (True, 4))
    ),
]
QUICK = [
    Case(sp=2, gas=4),
    Case(sp=2, dp=2, zero_stage=2, tied=True),
    Case(sp=2, zero_stage=3),
    Case(sp=2, pp=2, gas=4, tied=True),
    Case(sp=2, tp=2, kv_heads=2, zero_stage=3),
    Case(tp=2, sequence_parallel=True, gas=4, tied=True),
    Case(tp=2, sequence_parallel=True, zero_stage=3),
    Case(tp=2, pp=2, sequence_parallel=True, gas=2),
    Case(tp=2, sp=2, sequence_parallel=True, zero_stage=2),
    Case(tp=2, sequence_parallel=True, dtype="bf16"),
]
RECOMPUTED = [
    Case(**layout, recompute=recompute, gas=2)
    for layout in (
        {"sp": 2, "tp": 2, "kv_heads": 2},
        {"tp": 2, "sequence_parallel": True},
        {"tp": 2, "sequence_parallel": True, "zero_stage": 3},
        {"tp": 2, "pp": 2, "sequence_parallel": True},
    )
    for recompute in ("selective", "full")
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_layout(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("case", [*MATRIX, *(Case(**layout) for layout in FEWER_KEYS)], ids=str)
def test_layout_long(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("case", RECOMPUTED, ids=str)
def test_activation_checkpointing(case: Case) -> None:
    check(case)


K = 3
SEQUENCE = {"tp": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"sp": 2}, {"tp": 2}),
        ({"tp": 2}, {"sp": 2, "zero_stage": 3}),
        pytest.param(SEQUENCE, {"sp": 2, "dp": 2, "zero_stage": 2}, marks=pytest.mark.long),
        pytest.param(
            {"sp": 2, "dp": 2, "zero_stage": 3},
            {**SEQUENCE, "zero_stage": 3},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_a_checkpoint_knows_of_neither(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    written, read = (Case(**layout, gas=2, optimizer="adamw") for layout in (before, after))
    whole = curves(Case(gas=2, optimizer="adamw", steps=2 * K))[0]
    saved(written, K, tmp_path)
    for curve in resumed(read, K, tmp_path):
        for (a, b), (c, d) in zip(whole[K:], curve, strict=True):
            assert a == pytest.approx(c, abs=1e-5)
            assert b == pytest.approx(d, abs=1e-5)


Told = tuple[float, list[int], torch.Tensor]


def evaluate_and_generate(variables: Mapping[str, str]) -> Told:
    """After two steps: loss of an evaluation, a greedy continuation, logits (2, 30, V/tp)."""
    config = front.run_config(variables)
    engine = front.build(config)
    front.steps(config, engine, 0, 2)
    loss = float(engine.eval_batch(front.micro_batches(config, engine.groups, 7)))
    sizes = {"vocab_size": config.model.vocab_size, "context": config.model.seq_length}
    text = generate(
        engine,
        [3, 1, 4, 1, 5],
        4,
        sampling=Sampling(temperature=0),
        control=make_control(),
        **sizes,
    )
    logits = engine.logits(front.probe(config)[:, :30])
    return loss, text, torch.empty(0) if logits is None else logits


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"SP": "2"}, marks=pytest.mark.long),
        {"SP": "2", "PP": "2"},
        pytest.param({"TP": "2", "SEQUENCE_PARALLEL": "1"}, marks=pytest.mark.long),
        {"TP": "2", "PP": "2", "SEQUENCE_PARALLEL": "1"},
        pytest.param(
            {"TP": "2", "SP": "2", "SEQUENCE_PARALLEL": "1", "ZERO_STAGE": "3"},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_evaluation_and_generation(variables: dict[str, str]) -> None:
    ((want_loss, want_text, want_logits),) = run(evaluate_and_generate, 1, {})
    results = run(evaluate_and_generate, front.world(variables), variables)
    for loss, text, _ in results:
        assert loss == pytest.approx(want_loss, abs=1e-5)
        assert text == want_text
    tp = int(variables.get("TP", "1"))
    parts = [logits for _, _, logits in results if logits.numel()][-tp:]
    logits = torch.cat(parts, dim=-1)[..., :200]
    torch.testing.assert_close(logits, want_logits[..., :200], rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "variables",
    [
        {"SP": "2", "WORLD_SIZE": "4", "ZERO_STAGE": "3", "ZERO_HPZ_PARTITION_SIZE": "2"},
        {"SP": "2", "WORLD_SIZE": "4", "ZERO_STAGE": "3", "MICS_SHARD_SIZE": "2"},
        {"SP": "2", "PP": "2", "PIPELINE_SCHEDULE": "dualpipev"},
        {"TP": "2", "PP": "2", "PIPELINE_SCHEDULE": "dualpipev", "SEQUENCE_PARALLEL": "1"},
    ],
    ids=str,
)
def test_with_other_ways_to_cut(variables: dict[str, str]) -> None:
    (want,) = run(front.train, 1, {}, 4)
    for got in run(front.train, front.world(variables), variables, 4):
        for pair, wanted in zip(got, want, strict=True):
            assert pair == pytest.approx(wanted, abs=1e-5)
