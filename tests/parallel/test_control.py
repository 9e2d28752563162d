"""Messages over the grid of ranks equal those of one flat group, for worlds of any shape."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron.parallel.control import ALONE, make_control, row_length
from tests.spawn import run


def _talk(wanted: int) -> dict[str, object]:
    control = make_control()
    assert (control.rank, control.size) == (dist.get_rank(), wanted)
    control.barrier()

    def fail() -> None:
        raise OSError("no disk")

    failed = ""
    try:
        control.first(fail)
    except OSError as error:
        failed = str(error)
    return {
        "maximum": control.maximum([control.rank, -control.rank, 7]),
        "sum": control.sum([0.1 * control.rank, float("nan")])[0],
        "gathered": control.gather({"rank": control.rank, "text": "x" * control.rank}),
        "broadcast": control.broadcast(["all", 3] if control.rank == 0 else None),
        "all": control.all_gather(control.rank**2),
        "first": control.first(lambda: "made once"),
        "failed": failed,
    }


@pytest.mark.parametrize("world", [1, 2, 9])
def test_messages(world: int) -> None:
    results = run(_talk, world, world)
    for rank, got in enumerate(results):
        assert got["maximum"] == [world - 1, 0, 7]
        assert got["sum"] == results[0]["sum"] == pytest.approx(0.1 * sum(range(world)))
        whole = [{"rank": r, "text": "x" * r} for r in range(world)]
        assert got["gathered"] == (whole if rank == 0 else None)
        assert got["broadcast"] == ["all", 3]
        assert got["all"] == [r**2 for r in range(world)]
        assert got["first"] == "made once"
        assert got["failed"] == "no disk"


def test_alone_needs_no_group() -> None:
    assert ALONE.maximum([3]) == [3] and ALONE.all_gather("a") == ["a"] and ALONE.gather(1) == [1]


@pytest.mark.parametrize(
    ("world", "row"),
    [(1, 1), (2, 2), (4, 4), (8, 8), (9, 3), (11, 11), (12, 4), (96, 12), (3072, 64)],
)
def test_groups_grow_with_the_root_of_the_world(world: int, row: int) -> None:
    assert row_length(world) == row
