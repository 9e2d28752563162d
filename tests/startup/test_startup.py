"""A rank's work at the start does not grow with the world."""

from __future__ import annotations

import pytest

from tests.benchmarks.measure_startup import LAYOUTS, WORLDS, main, measure
from tests.spawn import run

ZERO_STAGES = ["1", "3"]
GROWTH = 2.0
ROUNDS = 4
QUICK = [("2x8", "1"), ("1x1", "1")]
CASES = [(layout, stage) for layout in LAYOUTS for stage in ZERO_STAGES]
CASES = [(layout, stage) for layout, stage in CASES if layout == "1x1" or stage == "1"]


def measured(world: int, layout: str, rank: int, zero_stage: str) -> dict:
    return run(measure, 1, world, layout, rank, zero_stage)[0]


def check(layout: str, zero_stage: str, worlds: tuple[int, ...]) -> None:
    """Groups are counted; of the seconds of a rank's own CPU the fewest count, noise only adds."""
    groups, seconds = set(), {world: [] for world in worlds}
    for _ in range(ROUNDS):
        for world in worlds:
            for rank in (0, world - 1):
                found = measured(world, layout, rank, zero_stage)
                groups.add(len(found["groups"]))
                seconds[world].append(found["seconds"])
        fewest = {world: min(values) for world, values in seconds.items()}
        if all(fewest[world] <= allowed(world) * fewest[worlds[0]] for world in worlds):
            break
    else:
        pytest.fail(f"{seconds}")
    assert len(groups) == 1 and max(groups) <= 6, groups


def allowed(world: int) -> float:
    """Lists of one entry a data-parallel rank stay; TP x PP = 1 has 12,288 of these ranks."""
    return GROWTH * max(1, world / 3072)


@pytest.mark.parametrize(("layout", "zero_stage"), QUICK)
def test_no_growth(layout: str, zero_stage: str) -> None:
    check(layout, zero_stage, (96, 3072))


@pytest.mark.long
@pytest.mark.parametrize(("layout", "zero_stage"), CASES)
def test_no_growth_long(layout: str, zero_stage: str) -> None:
    check(layout, zero_stage, WORLDS)


def test_groups_are_those_of_the_rank() -> None:
    """TP 2, PP 8, DP 4: each axis, all that shares a model copy, and the tied weight."""
    assert sorted(measured(64, "2x8", 0, "1")["groups"]) == [2, 2, 4, 8, 16]


@pytest.mark.long
def test_the_tool_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--worlds", "32", "--layouts", "2x8", "--repeat", "1"]) == 0
    header, _, first, last = capsys.readouterr().out.splitlines()
    assert "groups made" in header
    assert first.startswith("| 32 | 2x8 | 0 | 5 |") and last.startswith("| 32 | 2x8 | 31 | 5 |")
