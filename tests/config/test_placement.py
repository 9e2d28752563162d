"""Which ranks share what is what the run will do, and a slow placement is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.placement import Placement, crossing_warning
from megatron.parallel.layout import Layout
from tests.config.helpers import resolved

sizes = st.integers(1, 4)


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_groups_are_those_of_the_run(tp, sp, dp, pp):
    layout = Layout(tp=tp, sp=sp, dp=dp, pp=pp)
    axes = {axis.name: axis for axis in Placement(tp, sp, dp, pp, ranks_per_host=4).axes}
    for rank in range(layout.world):
        assert axes["TP"].group(rank) == layout.tp_ranks(rank)
        assert axes["SP"].group(rank) == layout.sp_ranks(rank)
        assert axes["DP"].group(rank) == layout.dp_ranks(rank)
        assert axes["PP"].group(rank) == layout.pp_ranks(rank)


def test_hosts_of_a_group():
    placement = Placement(tp=2, sp=2, dp=2, pp=2, ranks_per_host=6)
    assert [placement.hosts_of_a_group(axis) for axis in placement.axes] == [1, 2, 2, 2]


def test_a_bracket_stays_open_where_its_group_crosses_hosts():
    assert Placement(4, 1, 2, 1, ranks_per_host=3).drawing() == [
        "host 0: (0 1 2",
        "host 1: 3) (4 5",
        "host 2: 6 7)",
    ]
    assert Placement(2, 2, 2, 2, ranks_per_host=6).drawing() == [
        "host 0: stage 0: [(0 1) (2 3)] [(4 5)",
        "host 1: stage 0: (6 7)] stage 1: [(8 9) (10 11)]",
        "host 2: stage 1: [(12 13) (14 15)]",
    ]


def test_many_hosts_are_drawn_by_the_first_ones_and_the_last():
    lines = Placement(1, 1, 30, 1, ranks_per_host=3).drawing()
    assert [line.partition(":")[0] for line in lines] == [
        "host 0", "host 1", "host 2", "host 3", "... 5 more", "host 9",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tp", "dp", "per_host", "fitting"),
    [(8, 3, 12, 4), (16, 2, 12, 4), (3, 4, 4, 1), (2, 6, 12, None), (8, 1, 8, None)],
)
def test_a_tensor_parallel_group_that_crosses_hosts(tp, dp, per_host, fitting):
    warning = crossing_warning(Placement(tp, 1, dp, 1, per_host))
    if fitting is None:
        assert warning is None
    else:
        assert f"TP={tp} does not divide the {per_host} ranks of a host" in warning
        assert f"Use TP={fitting}" in warning


def test_warnings_reach_the_user():
    settings = {"HEADS": 4, "NUM_KV_HEAD": 4, "TP": 4, "NHOSTS": 2, "NGPU_PER_HOST": 6}
    assert any("cross hosts" in warning for warning in resolved(**settings).warnings)
    settings |= {"TP": 2}
    assert not any("cross hosts" in warning for warning in resolved(**settings).warnings)
    alone = resolved("--sequence-parallel").warnings
    assert any("SEQUENCE_PARALLEL has no effect with TP=1" in warning for warning in alone)
    assert not resolved("--sequence-parallel", TP=2).warnings
