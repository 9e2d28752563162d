"""When a job ends, from commands that print what those of Slurm and PBS print."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.launch import walltime
from megatron.launch.walltime import job_end

ROOT = Path(__file__).resolve().parents[2]
LATER = int(time.time()) + 5000

Command = Callable[..., None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Puts a command on PATH, where there is no other; it notes what it is called with."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, text: str, status: int = 0, before: str = "") -> None:
        path = tmp_path / name
        (tmp_path / f"{name}.out").write_text(text)
        path.write_text(
            f'#!/bin/bash\necho "$*" >> {path}.calls\n{before}\ncat {path}.out\nexit {status}\n'
        )
        path.chmod(0o755)

    return make


def calls(tmp_path: Path, name: str) -> list[str]:
    path = tmp_path / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def environ(**variables: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **variables}


def slurm(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at))


def qstat(started: float, walltime: str = "02:00:00", name: str = "stime") -> str:
    """As `qstat -f` of OpenPBS prints it, long lines continued."""
    limit = f"    Resource_List.walltime = {walltime}\n" if walltime else ""
    return (
        "Job Id: 123.server\n    Job_Name = train_alcf\n    resources_used.walltime = 00:10:00\n"
        "    job_state = R\n    Resource_List.select = 2\n"
        f"{limit}    {name} = {time.strftime('%a %b %e %H:%M:%S %Y', time.localtime(started))}\n"
        "    Variable_List = PBS_O_HOME=/home/u,PBS_O_LANG=en_US.UTF-8,\n"
        '\tNOTE=he said "stime = never",PBS_O_WORKDIR=/home/u\n\n'
    )


def test_without_a_job_nothing_is_asked() -> None:
    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        raise AssertionError(arguments)

    assert job_end({}, run) is None


def test_slurms_variable_is_enough(tmp_path: Path, command: Command) -> None:
    command("squeue", "never asked\n")
    assert job_end(environ(SLURM_JOB_ID="7", SLURM_JOB_END_TIME=str(LATER))) == LATER
    assert calls(tmp_path, "squeue") == []


def test_squeue(tmp_path: Path, command: Command) -> None:
    command("squeue", f"{slurm(LATER)}\n")
    assert job_end(environ(SLURM_JOB_ID="7")) == LATER
    assert calls(tmp_path, "squeue") == ["-h -j 7 -o %e"]


@pytest.mark.parametrize("text", ["", "slurm_load_jobs error: Unable to contact\n", "tomorrow\n"])
def test_scontrol_where_squeue_has_no_answer(command: Command, text: str) -> None:
    command("squeue", text, status=int("error" in text))
    command(
        "scontrol",
        "JobId=7 JobName=train_alcf\n   RunTime=00:10:00 TimeLimit=01:00:00 TimeMin=N/A\n"
        f"   StartTime={slurm(LATER - 3600)} EndTime={slurm(LATER)} Deadline=N/A\n",
    )
    assert job_end(environ(SLURM_JOB_ID="7")) == LATER


@pytest.mark.parametrize("word", ["NONE", "N/A", "Unknown", "UNLIMITED"])
def test_a_job_without_a_limit(
    command: Command, caplog: pytest.LogCaptureFixture, word: str
) -> None:
    command("squeue", f"{word}\n")
    assert job_end(environ(SLURM_JOB_ID="7")) is None
    command("squeue", "", status=1)
    command("scontrol", f"   StartTime={slurm(LATER)} EndTime={word} Deadline=N/A\n")
    assert job_end(environ(SLURM_JOB_ID="7")) is None
    assert caplog.records == []


@pytest.mark.parametrize("zone", ["America/Chicago", "Asia/Tokyo", "UTC"])
def test_times_are_of_the_hosts_zone(command: Command, zone: str) -> None:
    """The commands print local time: the one that they run in."""
    command("squeue", "", before=f"date -d @{LATER} +%Y-%m-%dT%H:%M:%S; exit")
    shown = (
        "cat <<EOF\n    Resource_List.walltime = 01:00:00\n"
        f"    stime = $(date -d @{LATER - 3600} '+%a %b %e %H:%M:%S %Y')\nEOF\nexit"
    )
    command("qstat", "", before=shown)
    script = "import os\nfrom megatron.launch.walltime import job_end\nprint(job_end(os.environ))"
    for job in ({"SLURM_JOB_ID": "7"}, {"PBS_JOBID": "7"}):
        found = subprocess.run(
            [sys.executable, "-c", script],
            env=environ(TZ=zone, PYTHONPATH=str(ROOT), **job),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.stdout.split() == [f"{LATER}.0"], found


@pytest.mark.parametrize("limit", ["02:00:00", "120:00", "7200"])
def test_qstat(tmp_path: Path, command: Command, limit: str) -> None:
    command("qstat", qstat(LATER - 7200, limit))
    assert job_end(environ(PBS_JOBID="123.server")) == LATER
    assert calls(tmp_path, "qstat") == ["-f 123.server"]


def test_torque(command: Command) -> None:
    command("qstat", qstat(LATER - 3600, "", "start_time"))
    assert job_end(environ(PBS_JOBID="123.server", PBS_WALLTIME="3600")) == LATER
    assert job_end(environ(PBS_JOBID="123.server")) is None  # no limit


def test_days(command: Command) -> None:
    command("qstat", qstat(LATER - 100 * 3600, "101:30:00"))
    assert job_end(environ(PBS_JOBID="123.server")) == LATER + 5400


@pytest.mark.parametrize(
    ("variables", "name", "text", "status"),
    [
        ({"PBS_JOBID": "1"}, "qstat", "qstat: Unknown Job Id 1\n", 153),
        ({"PBS_JOBID": "1"}, "qstat", "    Resource_List.walltime = 01:00:00\n", 0),
        ({"PBS_JOBID": "1"}, "qstat", qstat(LATER, "an hour"), 0),
        ({"PBS_JOBID": "1"}, "squeue", "", 0),
        ({"SLURM_JOB_ID": "1"}, "squeue", "", 0),
        ({"SLURM_JOB_ID": "1"}, "scontrol", "slurm_load_jobs error\n", 1),
        ({"SLURM_JOB_ID": "1"}, "scontrol", "JobId=1\n", 0),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "1000"}, "squeue", "", 0),
    ],
)
def test_no_answer_is_one_line(
    command: Command,
    caplog: pytest.LogCaptureFixture,
    variables: dict[str, str],
    name: str,
    text: str,
    status: int,
) -> None:
    """Also an end that has passed."""
    command(name, text, status)
    with caplog.at_level(logging.DEBUG):
        assert job_end(environ(**variables)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "job 1" in caplog.text


@pytest.mark.flaky(reruns=1)
def test_a_scheduler_that_hangs_is_left(
    command: Command, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walltime, "TIMEOUT_S", 0.3)
    command("qstat", "", before="exec sleep 60")
    began = time.monotonic()
    assert job_end(environ(PBS_JOBID="1")) is None
    assert time.monotonic() - began < 10
    assert "timed out" in caplog.text
