"""On a real link a rank sends what the formulas say, and no more: its network card has counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron.plan import link
from tests.hosts.conftest import require
from tools.benchmarks import wire
from tools.benchmarks.cable_arms import Arm, ours, run_config
from tools.benchmarks.exposed import Row, measured

DTYPES = {
    "fp32": {"DTYPE": "fp32"},
    "bf16": {"DTYPE": "bf16"},
    "bf16-reduced": {"DTYPE": "bf16", "GRAD_REDUCE_IN_BF16": "1"},
}
SHARDED = {"ENGINE": "sharded"}
ARMS = {
    f"{dtype}-zero{stage}-gas{steps}": Arm(
        ours, {**kind, **SHARDED, "ZERO_STAGE": str(stage), "GRAD_ACC_STEPS": str(steps)}
    )
    for dtype, kind in DTYPES.items()
    for stage, steps in ((0, 1), (1, 2), (2, 1), (2, 2))
}
HEADERS = 0.01  # of the bytes: Ethernet, IP, TCP and what it acknowledges, norms and losses


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    """Of all arms, in one round."""
    require("ip", "unshare", "nsenter")
    if problem := wire.problem():
        pytest.skip(problem)
    with wire.cable(wire.GIGABIT) as cable:
        yield {row.name: row for row in measured(ARMS, cable, 1, steps=5)}


@pytest.mark.parametrize("name", ARMS)
def test_bytes_of_a_step(rows: dict[str, Row], name: str) -> None:
    run = run_config(ARMS[name], 2)
    formula = link.gradients(run).size + link.weights(run).size
    assert rows[name].sent == pytest.approx(formula, rel=HEADERS)


def test_the_cable_is_as_slow_as_asked() -> None:
    if problem := wire.problem():
        pytest.skip(problem)
    with wire.cable(wire.GIGABIT) as cable:
        slow = wire.tried(cable)
        cable.shape(False)
        fast = wire.tried(cable)
    assert slow.bytes_per_s < 1.01 * wire.GIGABIT.bytes_per_s
    assert slow.latency_s > wire.GIGABIT.latency_s
    assert fast.bytes_per_s > 2 * wire.GIGABIT.bytes_per_s
    assert fast.latency_s < slow.latency_s
