"""train_alcf.sh in jobs of a real Slurm: submitted, stopped, requeued, resumed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts import lab
from tests.hosts.conftest import require, two_hosts
from tests.hosts.training import ROOT, assert_same, environment, steps

STARTED_S = 150.0
LONG = 40  # steps; a signal comes before the last one

pytestmark = pytest.mark.timeout(600)


class Job:
    """A job of train_alcf.sh on two hosts."""

    def __init__(self, made: lab.Lab, folder: Path, *options: str, **environ: str) -> None:
        self.made, self.folder = made, folder
        words = ["sbatch", "--parsable", "-N", "2", "-o", str(folder / "out"), *options]
        variables = environment(folder, **environ)
        variables["PATH"] = f"{made.folder / 'bin'}:{variables['PATH']}"
        words.append(str(ROOT / "train_alcf.sh"))
        done = made.run(lab.HEAD, *words, timeout=60, cwd=ROOT, **variables)
        assert done.returncode == 0, done.stdout
        self.id = done.stdout.strip()

    @property
    def output(self) -> str:
        path = self.folder / "out"
        return path.read_text(errors="replace") if path.exists() else ""

    def show(self, key: str) -> str:
        shown = self.made.run(lab.HEAD, "scontrol", "show", "job", self.id).stdout
        found = re.search(rf"\b{key}=(\S*)", shown)
        return found[1] if found else ""

    def wait_for(self, what: Callable[[], bool], within: float = STARTED_S) -> None:
        until = time.monotonic() + within
        while not what():
            ended = self.show("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not ended and time.monotonic() < until, f"{self.show('JobState')} {self.output}"
            time.sleep(0.1)

    def wait_for_step(self, number: int, after: int = 0) -> None:
        """Until step `number` is logged, in the output from character `after` on."""
        text = f"iteration={number:8d}/"
        self.wait_for(lambda: text in self.output[after:])

    def end(self, within: float = STARTED_S) -> str:
        """Its last state."""
        until = time.monotonic() + within
        while self.show("JobState") in ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < until, self.output
            time.sleep(0.1)
        return self.show("JobState")

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        lab.end_jobs(self.made)


@pytest.fixture(scope="module")
def whole(slurm: lab.Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    with Job(slurm, folder, TRAIN_ITERS=str(LONG)) as job:
        assert job.end() == "COMPLETED", job.output
    assert len(steps(folder)) == LONG
    return folder


def test_a_stopped_and_a_requeued_job_lose_nothing(
    slurm: lab.Lab, whole: Path, tmp_path: Path
) -> None:
    """SIGUSR1 as five minutes before the end; the next job is requeued, and ends the run."""
    long = {"TRAIN_ITERS": str(LONG), "SAVE_INTERVAL": "1000"}
    with Job(slurm, tmp_path, **long) as job:
        job.wait_for_step(3)
        assert slurm.run(lab.HEAD, "scancel", "--signal=USR1", "--batch", job.id).returncode == 0
        assert job.end() == "COMPLETED", job.output
        assert "SIGUSR1: saved step" in job.output
        stopped = len(steps(tmp_path))
        assert 3 <= stopped < LONG
    with Job(slurm, tmp_path, "--open-mode=append", **long) as job:
        job.wait_for_step(stopped + 3)
        assert "resumed from" in job.output
        slurm.run(lab.HEAD, "scontrol", "requeue", job.id)
        job.wait_for(lambda: job.show("JobState") == "PENDING")
        slurm.run(lab.HEAD, "scontrol", "update", f"jobid={job.id}", "StartTime=now")
        assert job.end() == "COMPLETED", job.output
        assert job.show("Restarts") == "1"
    assert_same(tmp_path, whole)


@pytest.mark.by_hand
def test_a_host_that_fails_costs_the_steps_since_the_last_save(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Its power goes; Slurm notices, requeues the job, and the host comes back: about 2 min."""
    require("sshd", "slurmctld")
    with two_hosts(tmp_path_factory.mktemp("failing")) as made:
        lab.with_slurm(made)
        job = Job(made, tmp_path, "--open-mode=append", TRAIN_ITERS=str(LONG), SAVE_INTERVAL="2")
        job.wait_for_step(3)
        made.off("n2")
        job.wait_for(lambda: job.show("JobState") != "RUNNING", within=120)
        made.boot("n2")
        assert made.run("n2", "slurmd", "-N", "n2").returncode == 0
        made.run(lab.HEAD, "scontrol", "update", "nodename=n2", "state=resume")
        job.wait_for(lambda: job.show("JobState") in ("PENDING", "RUNNING"), within=120)
        made.run(lab.HEAD, "scontrol", "update", f"jobid={job.id}", "StartTime=now")
        assert job.end() == "COMPLETED", job.output
        assert job.show("Restarts") == "1"
    assert_same(tmp_path, whole)
