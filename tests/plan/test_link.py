"""The model of a step on a link against steps that were measured on one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest

from megatron.config.resolve import Site, resolve
from megatron.config.schema import RunConfig
from megatron.plan import link
from megatron.plan.link import Link, Traffic


class Measured(NamedTuple):
    """A row of docs/benchmarks/link.md.

    Attributes:
        variables: of the run, over COMMON.
        sent: bytes of a rank and step.
        step_s, alone_s: on the cable, and where communication costs next to nothing.
    """

    variables: Mapping[str, str]
    sent: float
    step_s: float
    alone_s: float


COMMON = {
    "DRY_RUN": "1",
    "TOKENIZER_TYPE": "NullTokenizer",
    "DTYPE": "fp32",
    "NLAYERS": "4",
    "HIDDEN": "64",
    "HEADS": "4",
    "NUM_KV_HEAD": "4",
    "FFN_HIDDEN_SIZE": "64",
    "SEQ": "32",
    "MICRO_BATCH": "64",
    "VOCAB_SIZE": "128",
    "WORLD_SIZE": "2",
    "GLOBAL_BATCH": "",
}
CABLE = Link(124.6e6, 127e-6)  # as sockets measured it
TENSOR = Measured({"TP": "2"}, 9.51e6, 0.192, 0.112)
PIPELINES = {
    2: Measured({"PP": "2", "GRAD_ACC_STEPS": "2"}, 1.05e6, 0.188, 0.170),
    4: Measured({"PP": "2", "GRAD_ACC_STEPS": "4"}, 2.10e6, 0.315, 0.283),
}


def config(variables: Mapping[str, str]) -> RunConfig:
    return resolve({**COMMON, **variables}, [], Site()).run


@pytest.mark.parametrize(
    ("row", "traffic"),
    [(TENSOR, link.tensor_parallel), *((row, link.pipeline) for row in PIPELINES.values())],
    ids=["tp2", "pp2-m2", "pp2-m4"],
)
def test_a_step_is_as_long_as_measured(
    row: Measured, traffic: Callable[[RunConfig], Traffic]
) -> None:
    """And what communication adds to it within a quarter, which the whole step would hide."""
    modelled = link.step_seconds(row.alone_s, traffic(config(row.variables)), CABLE)
    assert modelled == pytest.approx(row.step_s, rel=0.15)
    assert modelled - row.alone_s == pytest.approx(row.step_s - row.alone_s, rel=0.25)


def test_bytes_are_those_of_the_network_card() -> None:
    assert link.tensor_parallel(config(TENSOR.variables)).size == pytest.approx(TENSOR.sent, 0.03)
    for row in PIPELINES.values():  # a stage sends half of what is on its path
        path = link.pipeline(config(row.variables)).size
        assert path / 2 == pytest.approx(row.sent, rel=0.03)


@pytest.mark.parametrize(
    ("variables", "reduced", "gathered"),
    [
        ({"ZERO_STAGE": "1"}, 4, 4),
        ({"ZERO_STAGE": "1", "GRAD_ACC_STEPS": "3"}, 4, 4),
        ({"ZERO_STAGE": "2", "GRAD_ACC_STEPS": "3"}, 12, 4),
        ({"DTYPE": "bf16"}, 4, 2),
        ({"DTYPE": "bf16", "GRAD_REDUCE_IN_BF16": "1"}, 2, 2),
        ({"DTYPE": "bf16", "GRAD_REDUCE_IN_BF16": "1", "WORLD_SIZE": "4", "TP": "2"}, 1, 1),
    ],
    ids=str,
)
def test_gradients_and_weights(variables: dict[str, str], reduced: float, gathered: float) -> None:
    """Bytes a parameter of the model, of which one of two ranks sends a half."""
    run = config(variables)
    assert link.gradients(run).size == pytest.approx(run.parameters * reduced / 2, rel=1e-6)
    assert link.weights(run).size == pytest.approx(run.parameters * gathered / 2, rel=1e-6)


def test_more_ranks_send_more_and_more_often() -> None:
    size = 12.0
    assert [link.scatter(size, ranks) for ranks in (1, 2, 4)] == [(0, 0), (6, 1), (9, 3)]
    assert link.all_reduce(size, 4) == Traffic(18, 6)


def test_what_is_hidden_costs_nothing_and_no_less() -> None:
    traffic = Traffic(1e6, 10)
    slow = Link(1e6, 0.1)
    assert traffic.seconds(slow) == pytest.approx(2.0)
    assert link.step_seconds(5.0, traffic, slow) == pytest.approx(7.0)
    assert link.step_seconds(5.0, traffic, slow, hidden_s=1.5) == pytest.approx(5.5)
    assert link.step_seconds(5.0, traffic, slow, hidden_s=9.0) == 5.0
