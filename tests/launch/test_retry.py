"""RETRIES: what is started again, when, and where; with programs that count their starts."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.config.resolve import Site, resolve
from megatron.config.schema import RunConfig
from megatron.launch import launch_plan, retry
from megatron.launch.launch_plan import LaunchRequest
from megatron.launch.local import Attempt
from megatron.launch.retry import is_final, newest_step, run_with_retries
from megatron.launch.screen import Screen
from tests.launch.places import at, pbs_job

COUNTING = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path({folder!r}), int(os.environ['RANK'])
starts = folder / f'starts{{rank}}'
number = len(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text('x' * number)
def save(step):
    (folder / 'checkpoints' / f'step-{{step:08d}}').mkdir(parents=True, exist_ok=True)
"""


def configuration(folder: Path, **environ: str) -> RunConfig:
    site = Site("laptop", False, 1, 0, {})
    return resolve({"RUN_DIR": str(folder), "TP": "2", **environ}, [], site).run


def run(folder: Path, script: str, retries: int, pause_s: float = 0.01) -> tuple[int, list[str]]:
    """Status of two ranks of a program, and what was written; `number` is which start it is."""
    path = folder / "program.py"
    path.write_text(COUNTING.format(folder=str(folder)) + script, encoding="utf-8")
    request = LaunchRequest(2, 1, 2, launcher="local")
    environ = {"PATH": os.environ["PATH"]}
    planned = launch_plan.make_plan(request, [sys.executable, str(path)], environ, at("laptop", {}))
    config = configuration(folder, RETRIES=str(retries))
    with closing(Screen(folder / "output.log")) as screen:
        status = run_with_retries(planned, screen, config, pause_s)
    return status, (folder / "output.log").read_text(encoding="utf-8").splitlines()


def starts(folder: Path) -> int:
    return len((folder / "starts0").read_text())


FAIL = "if rank == 1: sys.exit('error: lost the device')\ntime.sleep(20)\n"


def test_a_run_that_fails_twice_is_started_three_times(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "if number > 2: sys.exit(0)\n" + FAIL, 3)
    assert (status, starts(tmp_path)) == (0, 3)
    said = [line for line in lines if line.startswith("retry ")]
    assert said == [
        f"retry {number} of 3 in {pause} s: rank 1 failed with status 1; "
        f"resumes from the newest sound checkpoint"
        for number, pause in ((1, "0.01"), (2, "0.02"))
    ]


def test_the_last_failure_is_the_status_and_the_last_word(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n" + FAIL, 1)
    assert (status, starts(tmp_path)) == (137, 2)
    assert "rank 1 failed with status 137" in lines[-1]


def test_without_retries_there_are_none(tmp_path: Path) -> None:
    status, lines = run(tmp_path, FAIL, 0)
    assert (status, starts(tmp_path)) == (1, 1)
    assert lines[-1] == "error: lost the device"


@pytest.mark.parametrize(
    ("status", "signals", "final"),
    [
        (0, (), True), (2, (), True), (3, (), True), (4, (), True), (5, (), True), (127, (), True),
        (1, (), False), (6, (), False), (124, (), False), (134, (), False), (137, (), False),
        (143, (), False), (255, (), False),
        (143, (signal.SIGTERM,), True), (1, (signal.SIGINT,), True), (6, (signal.SIGUSR1,), True),
        (129, (signal.SIGHUP,), True), (1, (signal.SIGUSR2,), False),
    ],
)  # fmt: skip
def test_what_is_not_started_again(status: int, signals: tuple[int, ...], final: bool) -> None:
    assert is_final(Attempt(status, signals)) is final


def test_a_wrong_setting_is_not_tried_again(tmp_path: Path) -> None:
    status, _ = run(tmp_path, "sys.exit(2)\n", 3)
    assert (status, starts(tmp_path)) == (2, 1)


@pytest.mark.long
def test_a_checkpoint_makes_the_pause_short_again_but_gives_no_more_retries(
    tmp_path: Path,
) -> None:
    status, lines = run(tmp_path, "if number == 3: save(10)\n" + FAIL, 4)
    assert (status, starts(tmp_path)) == (1, 5)
    pauses = [line.split(" in ")[1].split(" s:")[0] for line in lines if line.startswith("retry")]
    assert pauses == ["0.01", "0.02", "0.01", "0.02"]


def test_the_longest_pause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 0.02)
    _, lines = run(tmp_path, "sys.exit(1)\n", 4)
    assert [line.split()[5] for line in lines if line.startswith("retry")] == [
        "0.01",
        "0.02",
        "0.02",
        "0.02",
    ]


@pytest.mark.flaky(reruns=1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_pause_and_the_run(tmp_path: Path, number: int) -> None:
    def send() -> None:
        until = time.monotonic() + 10
        log = tmp_path / "output.log"
        while time.monotonic() < until:
            if log.exists() and "retry 1" in log.read_text():
                os.kill(os.getpid(), number)
                return
            time.sleep(0.02)

    sender = threading.Thread(target=send)
    sender.start()
    began = time.monotonic()
    status, lines = run(tmp_path, "sys.exit(1)\n", 3, pause_s=30)
    sender.join()
    assert (status, starts(tmp_path)) == (128 + number, 1)
    assert "before the retry: not started again" in lines[-1]
    assert time.monotonic() - began < 15


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none") == 0
    for name in ("step-00000009", "step-00000012.tmp", "step-00000030.damaged-1", "latest"):
        (tmp_path / name).mkdir()
    assert newest_step(tmp_path) == 9


def test_a_host_whose_ranks_failed_first_twice_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hosts, two in use; the second fails, then its successor fails once."""
    blame = iter(["node2", "node2", "node3", "node1", "node3", "node1"])
    used: list[tuple[str, ...]] = []
    written: list[str] = []

    def failing(planned: launch_plan.LaunchPlan, *rest: object) -> Attempt:
        used.append(planned.hosts)
        assert planned.hostfile is not None
        written.append(planned.hostfile[0].read_text())
        return Attempt(1, reason="rank 1 failed with status 1", hosts=(next(blame),))

    monkeypatch.setattr(retry, "attempt", failing)
    request = LaunchRequest(2, 2, 1, launcher="mpiexec", folder=tmp_path)
    environ = pbs_job(tmp_path, "node1", "node2", "node3")
    planned = launch_plan.make_plan(request, ["python3", "x.py"], environ, at("node1", environ))
    config = configuration(tmp_path, RETRIES="5")
    with closing(Screen(tmp_path / "output.log")) as screen:
        assert run_with_retries(planned, screen, config, 0.001) == 1
    both, others = ("node1", "node2"), ("node1", "node3")
    assert used == [both, both, others, others, others, others]
    assert written[2] == "node1\nnode3\n"
    lines = (tmp_path / "output.log").read_text().splitlines()
    said = [line for line in lines if line.startswith("ranks of ")]
    assert said[0].startswith("ranks of node2 failed first 2 times: it is left out")
    assert said[1].startswith("ranks of node3 failed first 2 times: but the job has no host")
    assert len(said) == 2
    assert replace(planned, hosts=()) != planned
