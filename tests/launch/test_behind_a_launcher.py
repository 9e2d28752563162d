"""Ranks behind launchers that lose statuses and signals, as the real ones do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.launch import process
from megatron.launch.__main__ import main
from megatron.launch.failure import FirstError, end_line, is_end_line

ROOT = Path(__file__).resolve().parents[2]

LAUNCHER = """#!/bin/bash
# Starts two ranks. Statuses are joined by bits; only SIGUSR1 is passed on; nobody is ended.
if [[ $1 == --version ]]; then echo "$SAYS"; exit; fi
while [[ $1 != python-of-the-test ]]; do shift; done
shift
trap 'kill -USR1 $(jobs -p)' USR1
trap 'kill -KILL $(jobs -p); exit 1' TERM INT HUP
for rank in 0 1; do PMI_RANK=$rank PMI_SIZE=2 MPI_LOCALRANKID=$rank "$PYTHON" "$@" & done
status=0
for child in $(jobs -p); do
  wait $child; ended=$?
  while kill -0 $child 2>/dev/null; do wait $child; ended=$?; done
  status=$((status | ended))
done
echo "the launcher has the last word" >&2
exit ${STATUS:-$status}
"""
PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, os.environ["ROOT"])
from megatron.launch.failure import end_line
rank = int(os.environ["PMI_RANK"])
def end(status, *lines):
    sys.stderr.write("".join(f"{line}\\n" for line in (*lines, end_line(rank, status))))
    sys.stderr.flush()
    sys.exit(status)
"""


def behind(tmp_path: Path, program: str, says: str = "HYDRA", **more: str) -> dict[str, str]:
    """An environment with that launcher, and the program of the ranks."""
    for name in ("mpiexec", "mpirun"):
        (tmp_path / name).write_text(LAUNCHER)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "program.py").write_text(PROGRAM + program)
    return {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SAYS": says,
        "ROOT": str(ROOT),
        "PYTHON": sys.executable,
        **more,
    }


def argv(tmp_path: Path, name: str = "mpiexec") -> list[str]:
    program = [str(tmp_path / "program.py")]
    return ["-n", "2", "-ppn", "2", "--with", name, "--", "python-of-the-test", *program]


def test_the_status_and_the_last_word_are_the_first_failing_ranks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Hydra would say 4 | 1 = 5."""
    program = """
if rank == 1:
    end(4, "[rank 1] error: no such checkpoint")
time.sleep(0.3)
end(1, "[rank0]: Traceback (most recent call last):", "[rank0]: ConnectionError: gone")
"""
    assert main(argv(tmp_path), behind(tmp_path, program)) == 4
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2:] == ["rank 1 failed with status 4:", "[rank 1] error: no such checkpoint"]
    assert "the launcher has the last word" in lines
    assert not any("ended with status" in line for line in lines)


def test_a_launcher_that_fails_after_its_ranks_have_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(argv(tmp_path), behind(tmp_path, "end(0)", STATUS="255")) == 0
    assert "mpiexec says status 255" in capfd.readouterr().out
    assert main(argv(tmp_path), behind(tmp_path, "end(0 if rank else 3)", STATUS="143")) == 3


@pytest.mark.flaky(reruns=1)
def test_peers_of_a_failed_rank_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LINGER_S", 0.2)
    began = time.monotonic()
    program = "end(2, '[rank 1] error: wrong') if rank else time.sleep(60)"
    assert main(argv(tmp_path), behind(tmp_path, program)) == 2
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_open_mpi_is_sent_the_signal_that_it_passes_on(tmp_path: Path, number: int) -> None:
    program = """
signal.signal(signal.SIGUSR1, lambda *_: end(0, f"rank {rank} has saved"))
open(f"{sys.argv[0]}-{rank}", "w").close()
time.sleep(60)
"""
    environ = behind(tmp_path, program, says="mpirun (Open MPI) 5.0.3")
    command = [sys.executable, "-m", "megatron.launch", *argv(tmp_path, "mpirun")]
    started = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not all((tmp_path / f"program.py-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(started.pid, number)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 0, err
    assert "rank 0 has saved" in err and "rank 1 has saved" in err


def status_of(launchers: int, ranks: int, *lines: str) -> int:
    first = FirstError()
    for line in lines:
        first.take(line)
    return first.status(launchers, ranks)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["srun: error: n1: task 1: Exited with exit code 4", "srun: error: n2: task 2: Kill"], 4),
        (["srun: error: n1: tasks 0-1: Exited with exit code 3"], 3),
        (["srun: error: n2: task 3: Killed", "srun: error: n1: task 0: Terminated"], 137),
        (["srun: error: n2: task 3: Segmentation fault (core dumped)"], 139),
        (["srun: error: n2: task 3: Out Of Memory"], 137),
        (["x1.hsn: rank 5 died from signal 9"], 137),
        (["process rank 3 with PID 72 on node n2 exited on signal 11 (Segm"], 139),
        (["=   EXIT CODE: 9", end_line(0, 1)], 137),
        (["=   EXIT CODE: 15", end_line(0, 3)], 3),
        ([end_line(0, 3), "srun: error: n1: task 1: Killed"], 3),
        (["failed (exitcode: -9) local_rank: 1 (pid: 77) of binary: python"], 137),
        ([end_line(0, 1), "[rank 2] error: no data", end_line(2, 3)], 3),
        ([end_line(0, 0), end_line(1, 0)], 255),
        (["nothing that is known", "we fail on purpose (signal 9)"], 255),
    ],
)
def test_status_of_the_rank_that_failed(lines: list[str], status: int) -> None:
    assert status_of(255, 4, *lines) == status


def test_what_a_rank_says_last_is_not_shown() -> None:
    assert is_end_line(end_line(3, 0)) and is_end_line(end_line(3, 0) + end_line(1, 4))
    assert not is_end_line("") and not is_end_line(f"step 4 {end_line(3, 0)}")
    assert status_of(255, 2, end_line(1, 0) + end_line(0, 0)) == 0
