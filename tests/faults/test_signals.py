"""A signal at any moment: the run saves, stops within one step and 2 s, and its status is true.

LOG_INTERVAL=1000 throughout: nothing may wait for the next line of the log.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.harness import (
    CASES_AT_ONCE,
    LAYOUTS,
    Ended,
    Started,
    committed,
    each,
    started,
    steps,
    train,
)

MARGIN_S = 2.0
STEP_S = 1.0
FLUSHED = 6  # files and folders of a save of one rank
TERM, INT = signal.SIGTERM, signal.SIGINT
USR1, HUP = signal.SIGUSR1, signal.SIGHUP

MOMENTS: dict[str, dict[str, str]] = {
    "data": {"FAULTS_DATA_S": f"{STEP_S}"},
    "step": {"FAULTS_STEP_S": f"{STEP_S}"},
    "slow step": {"FAULTS_STEP_S": "5"},
    "evaluate": {"EVAL_INTERVAL": "2", "EVAL_ITERS": "100000"},
    "save": {"SAVE_INTERVAL": "2", "FAULTS_SAVE_S": "0.1"},
    "skip": {"TRAIN_RANGE_TO_SKIP": "3 1000000"},
    "last save": {"TRAIN_ITERS": "3", "FAULTS_SAVE_S": "0.1"},
    "sample": {"TRAIN_ITERS": "3", "FAULTS_SAMPLE_S": f"{STEP_S}"},
}
"""Moment -> what makes it last."""


@dataclass(frozen=True)
class Case:
    """A signal, where and when; `rank` None: the launcher; `then`: another one 0.2 s later."""

    number: int
    rank: int | None
    moment: str
    layout: str = "one"
    asynchronous: bool = False
    then: int = 0


CASES = [
    *(Case(number, None, "data") for number in (TERM, INT, USR1, HUP)),
    *(Case(number, None, "step") for number in (TERM, INT, USR1, HUP)),
    *(Case(number, 1, "step", "tp2") for number in (TERM, INT, USR1, HUP)),
    Case(TERM, 0, "step", "dp2"),
    Case(TERM, 1, "step", "pp2"),
    Case(HUP, None, "step", "tp2"),
    Case(INT, None, "step", "pp2", then=TERM),
    Case(TERM, None, "slow step"),
    Case(TERM, None, "evaluate"),
    Case(HUP, None, "evaluate"),
    Case(INT, 1, "evaluate", "tp2"),
    Case(TERM, None, "save"),
    Case(INT, None, "save"),
    Case(HUP, 1, "save", "dp2"),
    Case(TERM, None, "save", asynchronous=True),
    Case(INT, None, "save", "dp2", asynchronous=True),
    Case(USR1, 0, "save", asynchronous=True),
    Case(TERM, None, "skip"),
    Case(USR1, None, "skip", "dp2"),
    Case(TERM, None, "last save"),
    Case(INT, None, "last save", asynchronous=True),
    Case(TERM, None, "sample"),
    Case(HUP, None, "sample"),
    Case(INT, None, "sample", "dp2"),
]
QUICK = [
    Case(HUP, None, "step"),
    Case(TERM, 1, "step", "tp2"),
    Case(TERM, None, "evaluate"),
    Case(TERM, None, "sample"),
]


def load() -> float:
    """How many times slower than an idle host this one is, with the cases that run beside."""
    busy = max(os.getloadavg()[0], 2.0 * CASES_AT_ONCE)  # two ranks of a case
    return max(1.0, busy / len(os.sched_getaffinity(0)))


def stopped(case: Case, root: Path, data: str) -> str:
    """Runs one case; returns what is wrong. A late one is late twice: a disk may stall once."""
    name = "-".join(map(str, vars(case).values())).replace(" ", "-")
    wrong, late = stopped_once(case, root / name, data)
    if not wrong and late:
        wrong, late = stopped_once(case, root / f"{name}-again", data)
    return wrong or late


def stopped_once(case: Case, folder: Path, data: str) -> tuple[str, str]:
    """Runs one case; returns what is wrong, and whether it came too late."""
    settings = {
        "DATA_FILE_LIST": data,
        "TRAIN_ITERS": "1000000",
        "SAVE_INTERVAL": "0",
        "LOG_INTERVAL": "1000",
        "ASYNC_SAVE": str(int(case.asynchronous)),
        **LAYOUTS[case.layout],
        **MOMENTS[case.moment],
    }
    with started(folder, hooks=["moments"], **settings) as run:
        reach(run, case.moment)
        began = time.monotonic()
        run.signal(case.number, case.rank)
        step = 0 if case.moment == "data" else run.step()
        if case.then:
            time.sleep(0.2)
            run.signal(case.then, case.rank)
        ended = run.wait()
        seconds = time.monotonic() - began
    wrong = (
        wrong_status(case, ended)
        or wrong_end(case, folder, step)
        or ("a traceback:\n" + ended.output if "Traceback" in ended.output else "")
    )
    return wrong, too_late(case, seconds)


def reach(run: Started, moment: str) -> None:
    """Waits for the moment, and a random-looking while into it."""
    if moment.endswith("save"):
        run.wait_for("save")
        time.sleep(0.1)
    elif moment == "skip":
        run.wait_for("skip", 100)
    elif moment.endswith("step"):
        run.wait_for("step", 3)
        time.sleep(0.3)
    else:
        run.wait_for(moment)
        time.sleep(0.3)


def wrong_status(case: Case, ended: Ended) -> str:
    """0 with a checkpoint; 128 + n before there is anything to save, which a notice waits for."""
    nothing = case.moment == "data" and case.number != USR1
    expected = 128 + case.number if nothing else 0
    return "" if ended.status == expected else f"status {ended.status}:\n{ended.output}"


def wrong_end(case: Case, folder: Path, step: int) -> str:
    """The step that was under way at the signal is the last, and it is saved."""
    found = committed(folder)
    if case.moment == "data":
        expected = [1] if case.number == USR1 else []
        return f"saved {found}, not {expected}" if found != expected else ""
    if case.moment in ("last save", "sample"):
        return "" if found[-1:] == [3] else f"saved {found} of 3"
    allowed = range(step, step + 2)
    if case.moment == "skip":  # thousands in a second
        return "" if found and found[-1] > 3 else f"saved {found}"
    if not found or found[-1] not in allowed:
        return f"saved {found}, signalled in step {step}"
    return ""


def too_late(case: Case, seconds: float) -> str:
    """Whether it took longer than a step and the margin."""
    settings = MOMENTS[case.moment]
    step = float(settings.get("FAULTS_STEP_S", STEP_S))
    if "FAULTS_SAVE_S" in settings:  # the save in flight and that of the stop
        step = 2 * FLUSHED * float(settings["FAULTS_SAVE_S"])
    if case.moment == "data" and case.number == USR1:  # the rest of the start
        step += STEP_S + float(settings["FAULTS_DATA_S"])
    limit = (step + MARGIN_S) * load()
    return "" if seconds <= limit else f"{seconds:.1f} s, allowed {limit:.1f}"


def test_some_signals(data: str, tmp_path: Path) -> None:
    each(lambda case: stopped(case, tmp_path, data), QUICK)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_signals_at_every_moment(data: str, tmp_path: Path) -> None:
    assert len(CASES) >= 30
    each(lambda case: stopped(case, tmp_path, data), CASES)


@pytest.mark.flaky(reruns=1)
@pytest.mark.long
@pytest.mark.parametrize("number", [TERM, INT, HUP])
def test_a_signal_while_the_ranks_import(number: int, data: str, tmp_path: Path) -> None:
    """Ranks of their own interpreters, seconds before there is a handler of ours."""
    python = {"FAULTS_PYTHON": sys.executable}
    with started(tmp_path / "run", DATA_FILE_LIST=data, **LAYOUTS["tp2"], **python) as run:
        run.wait_until(lambda: "launch command" in run.output)
        time.sleep(0.7)
        began = time.monotonic()
        run.signal(number)
        ended = run.wait()
    assert ended.status == 128 + number, ended.output
    assert "Traceback" not in ended.output and signal.Signals(number).name in ended.last_line
    assert time.monotonic() - began < MARGIN_S * load()


@pytest.mark.long
def test_a_notice_while_the_ranks_import_is_kept(data: str, tmp_path: Path) -> None:
    """SIGUSR1 comes long before the end of a job: it stops the run at its first step."""
    python = {"FAULTS_PYTHON": sys.executable, "TRAIN_ITERS": "1000000"}
    with started(tmp_path / "run", DATA_FILE_LIST=data, **LAYOUTS["tp2"], **python) as run:
        run.wait_until(lambda: "launch command" in run.output)
        time.sleep(0.7)
        run.signal(USR1)
        ended = run.wait()
    assert ended.status == 0, ended.output
    assert len(committed(tmp_path / "run")) == 1 and len(steps(tmp_path / "run")) < 100


@pytest.mark.long
def test_a_resumed_run_stopped_before_its_first_step_loses_nothing(
    data: str, tmp_path: Path
) -> None:
    """Its state is in the checkpoint that it would have resumed from: status 0, or 128 + n."""
    settings = {"DATA_FILE_LIST": data, **LAYOUTS["one"]}
    assert train(tmp_path, TRAIN_ITERS="4", **settings).status == 0
    with started(tmp_path, hooks=["moments"], FAULTS_DATA_S="1", **settings) as run:
        run.wait_for("data")
        run.signal(TERM)
        ended = run.wait()
    assert ended.status in (0, 128 + TERM), ended.output
    assert committed(tmp_path) == [4] and steps(tmp_path) == [1, 2, 3, 4]
    assert train(tmp_path, **settings).status == 0
    assert steps(tmp_path) == list(range(1, 13))


@pytest.mark.long
def test_a_file_named_stop_stops_the_run(data: str, tmp_path: Path) -> None:
    settings = {"DATA_FILE_LIST": data, "TRAIN_ITERS": "1000000", "LOG_INTERVAL": "1000"}
    with started(
        tmp_path / "run", hooks=["moments"], FAULTS_STEP_S="0.1", **LAYOUTS["dp2"], **settings
    ) as run:
        run.wait_for("step", 3)
        (tmp_path / "run" / "STOP").touch()
        ended = run.wait()
    assert ended.status == 0, ended.output
    assert committed(tmp_path / "run")
    # It asks once: the next start would else stop at once.
    assert not (tmp_path / "run" / "STOP").exists()


@pytest.mark.long
def test_minutes_and_interval_end_a_run_that_is_saved(data: str, tmp_path: Path) -> None:
    settings = {"DATA_FILE_LIST": data, "TRAIN_ITERS": "1000000", "SAVE_INTERVAL": "0"}
    interval = train(tmp_path / "interval", EXIT_INTERVAL="6", **settings, **LAYOUTS["one"])
    assert interval.status == 0 and committed(tmp_path / "interval") == [6], interval.output
    minutes = train(
        tmp_path / "minutes", EXIT_DURATION_IN_MINS="0.05", **settings, **LAYOUTS["dp2"]
    )
    assert minutes.status == 0 and committed(tmp_path / "minutes"), minutes.output
