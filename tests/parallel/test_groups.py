from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.config.layout import Layout
from megatron.engine.patches import members_group
from megatron.parallel.control import make_control
from megatron.parallel.groups import SERIAL, Axis, make_groups
from tests.spawn import RankError, run


def sums(layout: Layout) -> dict[str, object]:
    groups = make_groups(layout)
    result: dict[str, object] = {"rank": groups.rank}
    for name in ("tp", "dp", "pp", "sp", "dp_sp"):
        axis = getattr(groups, name)
        total = torch.tensor([dist.get_rank()])
        if axis.group is not None:
            dist.all_reduce(total, group=axis.group)
            assert dist.get_rank(axis.group) == axis.rank
        assert axis.ranks[axis.rank] == groups.rank
        result[name] = (int(total), axis.size)
    return result


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, 2, 1),
        Layout(1, 2, 2),
        Layout(4, 1, 1),
        Layout(2, 2, 2),
        Layout(),
        Layout(sp=2),
        Layout(dp=2, sp=2),
        Layout(tp=2, dp=2, sp=2),
    ],
    ids=str,
)
def test_each_group_joins_the_ranks_of_its_axis(layout: Layout) -> None:
    for rank, result in enumerate(run(sums, layout.world, layout)):
        assert result == {
            "rank": rank,
            "tp": (sum(layout.tp_ranks(rank)), layout.tp),
            "dp": (sum(layout.dp_ranks(rank)), layout.dp),
            "pp": (sum(layout.pp_ranks(rank)), layout.pp),
            "sp": (sum(layout.sp_ranks(rank)), layout.sp),
            "dp_sp": (
                sum(layout.without_sequence().dp_ranks(rank)),
                layout.dp * layout.sp,
            ),
        }


def merged() -> tuple[object, ...]:
    groups = make_groups(Layout(tp=2, dp=2, sp=2)).without_sequence()
    assert groups.dp is groups.dp_sp and groups.sp.size == 1
    assert groups.layout == Layout(tp=2, dp=4)
    return groups.dp.ranks, groups.dp.rank


def test_without_the_sequence_axis_its_ranks_are_data_parallel() -> None:
    assert run(merged, 8)[3] == ((1, 3, 5, 7), 1)


def groups_made(layout: Layout) -> int:
    count = [0]
    original = dist.new_group

    def counted(*args: object, **kwargs: object) -> object:
        count[0] += 1
        return original(*args, **kwargs)

    dist.new_group = counted
    make_groups(layout)
    return count[0]


@pytest.mark.parametrize(
    ("layout", "groups"), [(Layout(dp=2), 1), (Layout(sp=2), 1), (Layout(dp=2, sp=2), 3)], ids=str
)
def test_no_group_is_made_twice(layout: Layout, groups: int) -> None:
    assert run(groups_made, layout.world, layout) == [groups] * layout.world


def test_a_layout_of_another_world_is_refused() -> None:
    with pytest.raises(
        RankError, match=r"the world has 1 ranks, but TP x PP x DP x SP = 2 x 1 x 1 x 1 = 2"
    ):
        run(sums, 1, Layout(tp=2))


def test_an_axis_of_one_has_no_group() -> None:
    assert Axis(None, 0, 1, (0,)) == SERIAL
    with pytest.raises(AssertionError):
        Axis(None, 0, 2, (0, 1))


def made(layout: Layout) -> list[tuple[list[int], bool]]:
    """(ranks, whether members alone make it) of this rank's groups, our own and DeepSpeed's."""
    noted, original = [], dist.new_group

    def new_group(ranks: list[int], **options: object) -> object:
        noted.append((list(ranks), bool(options.get("use_local_synchronization"))))
        return original(ranks, **options)

    dist.new_group = new_group
    make_groups(layout)
    members_group([0, 1])
    return noted


def test_only_its_members_make_a_group() -> None:
    """Else each would be a collective of the world, however few a rank makes."""
    for rank, groups in enumerate(run(made, 4, Layout(tp=2, dp=2))):
        assert len(groups) == 3 - (rank > 1)
        assert all(rank in ranks and alone for ranks, alone in groups)


def timeouts() -> list[float]:
    """Seconds of every group of this rank: ours, DeepSpeed's and those of control messages."""
    dist.destroy_process_group()
    store = dist.FileStore(os.environ["STORE"])
    seven = timedelta(seconds=77)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=seven)
    noted, original = [], dist.new_group

    def new_group(ranks: list[int], **options: object) -> object:
        noted.append(original(ranks, **options))
        return noted[-1]

    dist.new_group = new_group
    make_groups(Layout(tp=2, dp=2))
    members_group([0, 1] if rank < 2 else [2, 3])
    make_control()
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in noted]


def test_every_group_has_the_worlds_timeout(tmp_path: Path) -> None:
    """Else a slow read on one rank ends a run after torch's 10 minutes of NCCL."""
    found = run(timeouts, 4, environ={"STORE": str(tmp_path / "store")})
    assert found == [[77.0] * 4] * 4
