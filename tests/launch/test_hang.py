"""What counts as a hang, with made-up times; nothing here waits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron.launch import hang
from megatron.launch.hang import Limits, Table, describe, named, suspects
from megatron.launch.heartbeat import Beat


class Run:
    """A run whose ranks are told where they are; seconds pass by `wait`."""

    def __init__(self, ranks: int, fixed_s: float | None = None) -> None:
        self.table = Table(Limits(fixed_s))
        self.now, self.number = 100.0, 0
        self.beats = {
            rank: Beat(rank, "host", 7 + rank, 0, "start", None, 0) for rank in range(ranks)
        }
        self.beat()

    def beat(self, *ranks: int, **changes: object) -> None:
        """A beat of `ranks` (all of them if none are given), changed first."""
        self.number += 1
        for rank in ranks or self.beats:
            new = replace(self.beats[rank], number=self.number, **changes)  # type: ignore[arg-type]
            self.beats[rank] = new
            self.table.take(new, self.now)

    def wait(self, seconds: float, *silent: int) -> None:
        """Time passes, with a beat a second of all but `silent`."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 1, until)
            self.beat(*(rank for rank in self.beats if rank not in silent))

    def steps(self, first: int, last: int, seconds: float) -> None:
        """All ranks take steps of so many seconds each; they stand in `last` afterwards."""
        for step in range(first, last + 1):
            self.wait(seconds)
            self.beat(phase="step", step=step)

    def verdict(self, signal_at: float | None = None) -> str:
        return self.table.verdict(self.now, signal_at)


def test_nothing_heard_is_no_hang() -> None:
    assert Table(Limits()).verdict(1e6) == ""


def test_before_a_phase_was_completed_the_start_limit_holds() -> None:
    run = Run(2)
    run.wait(hang.START_S)
    assert run.verdict() == ""
    run.wait(2)
    assert "no rank has made progress for 1802 s (limit 1800 s)" in run.verdict()


def test_the_limit_of_a_phase_is_learnt() -> None:
    """Steps of 40 s: 400 s without one are a hang. Of 2 s: five minutes, not 20 s."""
    for seconds, limit in ((40.0, 400.0), (2.0, 300.0)):
        run = Run(2)
        run.steps(1, 4, seconds)
        run.wait(limit)
        assert run.verdict() == ""
        run.wait(1)
        assert run.verdict() != ""


def test_the_first_step_compiles_and_does_not_set_the_limit_of_the_others() -> None:
    run = Run(1)
    run.beat(phase="step", step=1)
    run.wait(170)
    run.beat(step=2)
    assert run.table.limits.limit("step") == 1700.0  # the only one so far
    run.steps(3, 5, 8)
    assert run.table.limits.limit("step") == 340.0  # twice the first: it may compile again
    run.steps(6, 6, 50)
    assert run.table.limits.limit("step") == 500.0


def test_ticks_are_progress() -> None:
    run = Run(2)
    run.steps(1, 3, 2)
    for tick in range(1, 10):
        run.wait(50)
        run.beat(ticks=tick)
        assert run.verdict() == ""


def test_one_rank_that_works_is_no_hang() -> None:
    """Rank 0 saves for the first time, the others wait for it in a step."""
    run = Run(3)
    run.steps(1, 5, 2)
    run.beat(0, phase="save")
    run.wait(hang.START_S - 1)
    assert run.verdict() == ""
    run.wait(2)
    assert run.verdict() != ""


@pytest.mark.parametrize(("fixed", "limit"), [(5.0, 5.0), (7200.0, 7200.0), (0.0, math.inf)])
def test_hang_timeout_holds_for_all_phases_once_a_step_has_begun(
    fixed: float, limit: float
) -> None:
    run = Run(2, fixed)
    assert run.table.limits.limit("start") == (math.inf if fixed == 0 else max(1800.0, fixed))
    run.beat(phase="step", step=1)
    for phase in ("step", "save", "evaluate"):
        assert run.table.limits.limit(phase) == limit


def test_a_silent_rank_is_named_though_others_tick() -> None:
    run = Run(2, 5.0)
    run.steps(1, 3, 2)
    for tick in range(7):
        run.wait(1, 1)
        run.beat(0, ticks=tick)
    assert run.verdict() == "rank 1 has been silent for 7 s (limit 5 s)"


def test_lost_datagrams_are_no_hang() -> None:
    """No rank can be two steps ahead of one that stands still."""
    run = Run(2, 5.0)
    run.steps(1, 3, 2)
    for step in range(4, 12):
        run.wait(1, 1)
        run.beat(0, step=step)
    assert run.verdict() == ""


def test_a_rank_that_has_ended_is_not_missed() -> None:
    run = Run(2, 5.0)
    run.steps(1, 3, 2)
    run.beat(1, closed=True)
    for tick in range(20):
        run.wait(1, 1)
        run.beat(0, ticks=tick)
    assert run.verdict() == ""
    run.beat(0, closed=True)
    run.now += 60
    assert run.verdict() == ""


def test_a_late_datagram_is_no_progress() -> None:
    run = Run(1, 5.0)
    run.steps(1, 3, 1)
    run.wait(4)
    run.table.take(Beat(0, "host", 7, 1, "start", None, 0), run.now)
    run.wait(2)
    assert run.verdict() != ""


def test_after_a_signal_the_ranks_should_answer_sooner() -> None:
    run = Run(2)
    run.steps(1, 4, 2)
    run.wait(10)
    asked = run.now
    run.wait(29)
    assert run.verdict(asked) == ""  # 39 s without progress, but asked 29 s ago
    run.wait(2)
    assert "31 s (limit 30 s)" in run.verdict(asked)
    assert run.verdict() == ""


def test_after_a_signal_a_first_save_may_take_its_time() -> None:
    run = Run(2)
    run.steps(1, 4, 2)
    asked = run.now
    run.beat(phase="save")
    run.wait(hang.START_S - 1)
    assert run.verdict(asked) == ""


def test_after_a_signal_hangs_end_a_run_that_does_not_watch_for_them() -> None:
    run = Run(2, 0.0)
    run.steps(1, 4, 2)
    asked = run.now
    run.wait(40)
    assert run.verdict() == ""
    assert run.verdict(asked) != ""


def test_after_a_signal_nothing_is_lost_until_a_step_has_ended() -> None:
    run = Run(2)
    asked = run.now
    for phase in ("load", "step"):
        run.beat(phase=phase)
        run.wait(31)
        assert run.verdict(asked) != ""


def test_the_table_names_the_odd_ones_first() -> None:
    run = Run(8)
    run.steps(39, 40, 2)
    run.beat(0, 2, 3, 4, 5, doing="all_reduce, called at megatron/parallel/sums.py:7")
    run.beat(6, phase="evaluate", doing="read of files.py")
    run.wait(12, 1)
    lines = describe(run.table, 9, run.now, 4.0)
    assert lines == [
        "rank 1 (host, pid 8) silent for 12 s, last heard in step 40",
        "rank 8 never heard",
        "rank 6 in evaluate at step 40: read of files.py",
        "rank 7 in step 40: ?",
        "ranks 0,2-5 in step 40: all_reduce, called at megatron/parallel/sums.py:7",
    ]
    assert suspects(run.table, run.now, 4.0) == [1]


def test_without_a_silent_rank_the_smallest_group_is_suspect() -> None:
    run = Run(4)
    run.steps(1, 2, 2)
    run.beat(0, 1, 3, doing="all_reduce")
    run.beat(2, doing="sleep of data.py")
    assert suspects(run.table, run.now, 4.0) == [2]


def test_names_of_ranks() -> None:
    assert named([3]) == "rank 3"
    assert named([5, 1, 0, 2]) == "ranks 0-2,5"


def test_strays_are_no_beats() -> None:
    beat = Beat(1, "host", 8, 3, "step", 40, 7)
    assert Beat.decode(beat.encode("secret"), "secret") == beat
    assert Beat.decode(beat.encode("guess"), "secret") is None
    for data in (b"", b"\xff", b"7", b"{}", b'{"token": "secret"}', b'{"token": "secret", "x": 1}'):
        assert Beat.decode(data, "secret") is None


def test_of_two_ranks_the_one_behind_is_looked_at_first() -> None:
    run = Run(2)
    run.beat(0, phase="step", step=3)
    run.beat(1, phase="step", step=2)
    assert hang.suspects(run.table, run.now, 4.0) == [1]
