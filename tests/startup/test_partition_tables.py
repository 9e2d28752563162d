"""The tables made in one pass are those that DeepSpeed makes."""

from __future__ import annotations

import copy

import pytest
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from megatron.engine.partition_tables import fill_tables

from tests.equivalence.training import Case, build
from tests.spawn import run

TABLES = (
    "param_to_partition_ids",
    "total_grads_in_partition",
    "remaining_grads_in_partition",
    "is_partition_reduced",
    "is_grad_computed",
    "grad_partition_insertion_offset",
    "grad_start_offset",
    "first_param_index_in_partition",
)


def both(case: Case) -> tuple[dict, dict]:
    """DeepSpeed's tables and ours, of an engine's own parameters."""
    zero = build(case).zero_optimizer
    results = []
    for fill in (
        DeepSpeedZeroOptimizer.initialize_gradient_partitioning_data_structures,
        fill_tables,
    ):
        for table in TABLES:
            setattr(zero, table, {})
        fill(zero)
        results.append({table: copy.deepcopy(getattr(zero, table)) for table in TABLES})
    return results[0], results[1]


@pytest.mark.parametrize("case", [Case(), Case(dp=2), Case(dp=4, zero_stage=2), Case(tp=2, dp=2)])
def test_same_tables(case: Case) -> None:
    for expected, found in run(both, case.world, case):
        assert found == expected
        assert any(len(ranks) > 1 for ranks in expected["param_to_partition_ids"][0].values()) or (
            case.dp == 1
        )


def test_every_rank_has_parameters_in_the_test() -> None:
    expected, _ = run(both, 4, Case(dp=4))[0]
    assert all(count > 0 for count in expected["total_grads_in_partition"][0].values())
