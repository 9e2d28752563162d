"""Compiled blocks in the real engine: eager's losses, one graph for all layers, none made later."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.utils import counters

from megatron.engine import compiled
from megatron.engine.compiled import CompiledForward
from tests.equivalence import front
from tests.spawn import run

EOD = 7
COMPILING = {"TORCHDYNAMO_DISABLE": "0"}  # which `run` sets to 1
LAYOUTS: dict[str, tuple[int, dict[str, str]]] = {
    "one": (1, {}),
    "documents": (1, {"RESET_ATTENTION_MASK": "1", "RESET_POSITION_IDS": "1"}),
    "tp2": (2, {"TP": "2", "USE_ACTIVATION_CHECKPOINTING": "1"}),
    "tp2-seq": (2, {"TP": "2", "SEQUENCE_PARALLEL": "1"}),
    "sp2": (2, {"SP": "2", "ZERO_STAGE": "2"}),
    "pp2": (2, {"PP": "2", "USE_ACTIVATION_CHECKPOINTING": "selective"}),
    "dualpipev": (2, {"PP": "2", "PIPELINE_SCHEDULE": "dualpipev"}),
    "zero0": (2, {"ZERO_STAGE": "0", "WORLD_SIZE": "2"}),
    "groups": (
        2,
        {
            "WORLD_SIZE": "2",
            "ZERO_STAGE": "2",
            "USE_ACTIVATION_CHECKPOINTING": "1",
            "ACT_CKPT_NUM_LAYERS": "2",
        },
    ),
}

Result = tuple[front.Curve, float, float, tuple[int, int, int]]


def trained(variables: dict[str, str], count: int, backend: str) -> Result:
    """Curve, evaluation and a sum of logits; graphs after warm-up and at the end; graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    compiled.BACKEND = backend
    config = front.run_config(variables)
    engine = front.build(config, eod=EOD)
    first = counters["stats"]["unique_graphs"]

    def evaluated() -> float:
        return float(engine.eval_batch(front.micro_batches(config, engine.groups, 99)))

    curve = front.steps(config, engine, 0, 2)
    evaluated()
    engine.logits(front.probe(config)[:1, :16])  # a text that is sampled while training
    curve += front.steps(config, engine, 2, count)
    logits = engine.logits(front.probe(config)[:1])  # another batch size than training's
    total = 0.0 if logits is None else float(logits.double().abs().sum())
    loss = evaluated()
    graphs = first, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return curve, loss, total, graphs


def compare(name: str, count: int, backend: str, more: dict[str, str], tolerance: float) -> None:
    """Holds compiled against eager on each rank, and the number of graphs at one."""
    ranks, variables = LAYOUTS[name][0], LAYOUTS[name][1] | more
    eager = run(trained, ranks, variables | {"COMPILE": "0"}, count, backend, timeout=120)
    fast = run(
        trained, ranks, variables | {"COMPILE": "1"}, count, backend, timeout=280, environ=COMPILING
    )
    for (want, evaluated, logits, none), (curve, loss, total, graphs) in zip(
        eager, fast, strict=True
    ):
        assert none == (0, 0, 0)
        assert graphs == (1, 1, 0)
        for one, other in zip(curve, want, strict=True):
            assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
        assert loss == pytest.approx(evaluated, rel=tolerance)
        assert math.isclose(total, logits, rel_tol=tolerance)


@pytest.mark.parametrize("name", ["one", pytest.param("tp2", marks=pytest.mark.long)])
def test_one_graph_serves_all_layers_steps_and_evaluations(name: str) -> None:
    compare(name, 4, "aot_eager", {}, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"one", "tp2"}))
def test_each_layout_has_one_graph(name: str) -> None:
    compare(name, 4, "aot_eager", {}, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("name", "dtype"), [("one", "fp32"), ("tp2", "bf16"), ("pp2", "fp32")])
def test_twenty_steps_of_inductors_code(name: str, dtype: str) -> None:
    more = {"DTYPE": dtype, "SEQ": "256"}  # two blocks of queries in the attention's own backward
    if dtype == "bf16":
        more["MICRO_BATCH"] = "4"  # two blocks of tokens in the weights' gradients
    compare(name, 20, "inductor", more, {"fp32": 1e-5, "bf16": 2e-3}[dtype])


def gradients(shape: tuple[int, int, int]) -> list[bool]:
    """Whether a warmed-up block's parameters have gradients."""
    compiled.BACKEND = "aot_eager"
    block = torch.nn.Linear(4, 4)
    block.forward = CompiledForward(block, shape)
    seen: list[int] = []
    block.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(1))
    blocks, seconds = compiled.warm_up(torch.nn.Sequential(block))
    assert blocks == 1 and seconds > 0
    return [bool(seen), block.weight.grad is not None, block.bias.grad is not None]


def test_warming_up_leaves_no_gradient_and_calls_no_hook() -> None:
    assert run(gradients, 1, (2, 3, 4), environ=COMPILING) == [[False, False, False]]


def test_zero3_is_not_compiled_and_says_so() -> None:
    from megatron.config.unused import unused

    config = front.run_config({"ZERO_STAGE": "3", "COMPILE": "1"})
    (line,) = unused(config, {"train.compile": "COMPILE"})
    assert line == "COMPILE=1 has no effect here: it is for ZERO_STAGE 0 to 2"
    off = front.run_config({"ZERO_STAGE": "3", "COMPILE": "0"})
    assert unused(off, {"train.compile": "COMPILE"}) == []
