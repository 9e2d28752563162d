from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.layout import Layout, crossing_warning
from tests.config.helpers import resolved

sizes = st.integers(1, 4)
layouts = st.builds(Layout, tp=sizes, pp=sizes, dp=sizes, sp=sizes)


@settings(deadline=None)  # a loaded machine is no failure
@given(layouts)
def test_ranks_and_coordinates_are_a_bijection(layout: Layout) -> None:
    seen = {layout.coordinates(rank) for rank in range(layout.world)}
    assert len(seen) == layout.world == layout.tp * layout.pp * layout.dp * layout.sp
    for rank in range(layout.world):
        pp, dp, sp, tp = layout.coordinates(rank)
        assert layout.rank(pp, dp, tp, sp) == rank


@settings(deadline=None)
@given(layouts)
def test_the_groups_of_each_axis_part_the_world(layout: Layout) -> None:
    for ranks_of, size in (
        (layout.tp_ranks, layout.tp),
        (layout.dp_ranks, layout.dp),
        (layout.pp_ranks, layout.pp),
        (layout.sp_ranks, layout.sp),
    ):
        groups = {ranks_of(rank) for rank in range(layout.world)}
        assert all(len(group) == size for group in groups)
        assert sorted(rank for group in groups for rank in group) == [*range(layout.world)]
        assert all(rank in ranks_of(rank) for rank in range(layout.world))


def test_the_order_is_pipeline_then_data_then_sequence_then_tensor() -> None:
    layout = Layout(tp=2, pp=2, dp=3, sp=2)
    assert [layout.coordinates(rank) for rank in (0, 1, 2, 4, 12, 23)] == [
        (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 2, 1, 1),
    ]  # fmt: skip
    assert layout.tp_ranks(3) == (2, 3)
    assert layout.sp_ranks(3) == (1, 3)
    assert layout.dp_ranks(3) == (3, 7, 11)
    assert layout.pp_ranks(3) == (3, 15)
    assert str(layout) == "tp2 sp2 pp2 dp3"
    assert str(Layout(tp=2, pp=2, dp=3)) == "tp2 pp2 dp3"


@settings(deadline=None)
@given(layouts)
def test_without_the_sequence_axis_its_ranks_are_data_parallel(layout: Layout) -> None:
    merged = layout.without_sequence()
    assert merged.world == layout.world and merged.sp == 1
    for rank in range(layout.world):
        ranks = merged.dp_ranks(rank)
        assert set(layout.sp_ranks(rank)) | set(layout.dp_ranks(rank)) <= set(ranks)
        assert [layout.dp_ranks(other).index(other) for other in ranks] == [
            number // layout.sp for number in range(len(ranks))
        ]
        assert merged.tp_ranks(rank) == layout.tp_ranks(rank)
        assert merged.pp_ranks(rank) == layout.pp_ranks(rank)


@settings(deadline=None)
@given(layouts)
def test_the_order_is_that_of_deepspeed(layout: Layout) -> None:
    topology = pytest.importorskip("deepspeed.runtime.pipe.topology")
    theirs = topology.PipeModelDataParallelTopology(
        num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp * layout.sp
    )
    for rank in range(layout.world):
        place = layout.coordinates(rank)
        data = place.dp * layout.sp + place.sp
        assert theirs.get_rank(pipe=place.pp, data=data, model=place.tp) == rank


@pytest.mark.parametrize("name", ["tp", "pp", "dp", "sp"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.upper()}=0"):
        Layout(**{name: 0})


def test_hosts_per_group():
    layout = Layout(tp=2, sp=2, dp=2, pp=2)
    assert [layout.hosts_per_group(axis, 6) for axis in layout.axes] == [1, 2, 2, 2]


def test_a_bracket_stays_open_where_its_group_crosses_hosts():
    assert Layout(tp=4, dp=2).drawing(3) == [
        "host 0: (0 1 2",
        "host 1: 3) (4 5",
        "host 2: 6 7)",
    ]
    assert Layout(2, 2, 2, 2).drawing(6) == [
        "host 0: stage 0: [(0 1) (2 3)] [(4 5)",
        "host 1: stage 0: (6 7)] stage 1: [(8 9) (10 11)]",
        "host 2: stage 1: [(12 13) (14 15)]",
    ]


def test_many_hosts_are_drawn_by_the_first_ones_and_the_last():
    lines = Layout(dp=30).drawing(3)
    assert [line.partition(":")[0] for line in lines] == [
        "host 0", "host 1", "host 2", "host 3", "... 5 more", "host 9",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tp", "dp", "per_host", "fitting"),
    [(8, 3, 12, 4), (16, 2, 12, 4), (3, 4, 4, 1), (2, 6, 12, None), (8, 1, 8, None)],
)
def test_a_tensor_parallel_group_that_crosses_hosts(tp, dp, per_host, fitting):
    warning = crossing_warning(Layout(tp=tp, dp=dp), per_host)
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
