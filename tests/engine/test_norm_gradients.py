"""Weights that tensor-parallel ranks replicate stay equal: their gradients are summed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megatron.model.norm import RMSNorm
from tests.equivalence import front
from tests.spawn import run

SEQUENCE = {"TP": "2", "SEQUENCE_PARALLEL": "1"}


def replicas(variables: Mapping[str, str]) -> tuple[dict[str, Tensor], int]:
    """The optimizer's values of replicated weights after two steps; norms that sum themselves."""
    config = front.run_config(variables)
    engine = front.build(config, large=True)
    front.steps(config, engine, 0, 2)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    values = {
        names[id(span.parameter)]: span.view(span.flat.detach()).clone()
        for span in engine.shards().spans()
        if not getattr(span.parameter, "tensor_model_parallel", False)
    }
    norms = [part for part in engine.module.modules() if isinstance(part, RMSNorm)]
    return values, sum(norm.summed.size > 1 for norm in norms)


@pytest.mark.parametrize(
    ("variables", "in_backward"),
    [
        ({**SEQUENCE, "DTYPE": "bf16", "GRAD_ACC_STEPS": "4"}, 0),
        ({**SEQUENCE, "DTYPE": "bf16", "ZERO_STAGE": "2"}, 0),
        ({**SEQUENCE, "DTYPE": "bf16", "ZERO_STAGE": "3"}, 0),
        ({**SEQUENCE, "CPU_OPTIMIZER": "1"}, 9),  # before DeepSpeed has taken their norm
        pytest.param({"TP": "2", "MODEL_ARCH": "Qwen3-0.6B"}, 0, marks=pytest.mark.long),
        pytest.param({**SEQUENCE, "DTYPE": "fp16"}, 0, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_replicated_weights_stay_equal(variables: dict[str, str], in_backward: int) -> None:
    results = run(replicas, front.world(variables), variables)
    (first, summed), *others = results
    assert summed == in_backward
    assert len(first) >= 9 and not any(torch.equal(v, torch.ones_like(v)) for v in first.values())
    for values, _ in others:
        assert all(torch.equal(value, values[name]) for name, value in first.items())
