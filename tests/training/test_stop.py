"""What asks a rank to stop, by a clock and a folder of the test's own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron.training import stop
from megatron.training.stop import StopRequest, cause_text


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_is_noted_and_the_first_one_counts(number: signal.Signals) -> None:
    with StopRequest() as request:
        assert request.cause() == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.cause() == number
        assert cause_text(request.cause()) == f"signal {number.name}"


def test_a_second_ctrl_c_ends_the_process() -> None:
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_previous_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with StopRequest():
        pass
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before


def test_the_file_is_seen_within_a_second_and_one_from_before_is_removed(tmp_path: Path) -> None:
    file, clock = tmp_path / "STOP", Clock()
    file.touch()
    with StopRequest(file, clock=clock) as request:
        assert not file.exists()
        file.touch()
        clock.now += 1
        assert request.cause() == stop.STOP_FILE
        request.remove_file()
        clock.now += 1
        assert request.cause() == 0


def test_a_run_of_limited_length(tmp_path: Path) -> None:
    clock = Clock()
    request = StopRequest(stop_at=1060.0, clock=clock)
    clock.now = 1059.9
    assert request.cause() == 0
    clock.now = 1060.0
    assert request.cause() == stop.DURATION


def test_a_run_stops_as_long_before_its_walltime_as_step_and_save_have_taken() -> None:
    clock = Clock()
    request = StopRequest(job_end=2000.0, clock=clock)
    clock.now = 2000 - 2 * stop.FIRST_SAVE_S - stop.SPARE_S - 0.1
    assert request.cause() == 0  # no step, no save yet: the assumed save
    request.save_took(20)
    request.save_took(5)
    request.step_begins()
    clock.now += 30
    request.step_took()
    clock.now = 2000 - 2 * (30 + 20) - stop.SPARE_S - 0.1
    assert request.cause() == 0
    clock.now += 0.1
    assert request.cause() == stop.WALLTIME


def test_the_first_steps_length_is_forgotten() -> None:
    clock = Clock()
    request = StopRequest(job_end=2000.0, clock=clock)
    request.save_took(0)
    for seconds in [500.0] + [1.0] * stop.RECENT_STEPS:
        request.step_begins()
        clock.now += seconds
        request.step_took()
    clock.now = 2000 - 2 - stop.SPARE_S - 0.1
    assert request.cause() == 0
    clock.now += 0.1
    assert request.cause() == stop.WALLTIME
