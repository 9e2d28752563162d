"""Each launcher, for real, on two hosts: who the ranks are, where they meet, how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import lab
from tests.hosts.conftest import require
from tests.hosts.launchers import MPICH, OPEN_MPI, ROOT, Launcher

PROBE = str(Path(__file__).with_name("probe.py"))
CARRIED = {"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth0", "CCL_KVS_MODE": "mpi", "FI_LOG": "1"}
STARTED_S = 30.0


def test_ranks_hosts_and_variables(launcher: Launcher, tmp_path: Path) -> None:
    done = launcher.run([PROBE, str(tmp_path)], **CARRIED)
    assert done.returncode == 0, done.stdout
    for rank in checked(tmp_path, ["n1", "n1", "n2", "n2"]):
        assert CARRIED.items() <= rank["environ"].items()
        assert rank["environ"]["DS_ACCELERATOR"] == "cpu"  # the launcher's own, not the user's
    lines = [line for line in done.stdout.splitlines() if "is there" in line]
    assert sorted(lines) == [f"rank {rank} of 4 is there" for rank in range(4)]  # lines are whole


DIRECT = {
    "mpich": [MPICH, "-n", "4", "-ppn", "2", "-hosts", "n1,n2"],
    "open-mpi": [OPEN_MPI, "-n", "4", "-H", "n1:2,n2:2", "-x", "MASTER_ADDR", "-x", "PYTHONPATH"],
    "slurm": ["srun", "-N", "2", "-n", "4", "--ntasks-per-node=2"],
}


@pytest.mark.parametrize("name", DIRECT)
def test_ranks_of_a_launcher_that_is_not_ours(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    """As in `mpiexec python3 pretrain_gpt_alcf.py`: nothing but the launcher's own variables."""
    words = DIRECT[name]
    if name != "slurm":
        require(words[0])
    made: lab.Lab = request.getfixturevalue("slurm" if name == "slurm" else "hosts")
    words = [*words, sys.executable, PROBE, str(tmp_path)]
    done = made.run("n1", *words, MASTER_ADDR="n1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout
    checked(tmp_path, ["n1", "n1", "n2", "n2"])


ENDS = {"status": ("3", 3, "found wrong"), "traceback": ("traceback", 1, "did wrong"),
        "killed": ("kill", 137, "SIGKILL")}  # fmt: skip


@pytest.mark.parametrize(("failing", "end"), [(0, "traceback"), (3, "status"), (3, "killed")])
def test_the_failing_ranks_error_is_last(
    launcher: Launcher, tmp_path: Path, failing: int, end: str
) -> None:
    how, status, words = ENDS[end]
    done = launcher.run([PROBE, str(tmp_path), "fail", str(failing), how])
    last = "\n".join(done.stdout.strip().splitlines()[-12:])
    # torchrun's own status is 1, whatever its ranks' are.
    assert done.returncode == status or (launcher.word == "torchrun" and done.returncode)
    assert words in last, done.stdout
    if how == "kill":  # it says nothing itself: MPICH names its host, torchrun its rank
        assert "n2" in done.stdout
    else:
        assert f"rank {failing}" in last


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_reaches_all_ranks_in_time(launcher: Launcher, tmp_path: Path, name: str) -> None:
    """They take longer to save than Open MPI and torchrun like to wait."""
    with launcher.started([PROBE, str(tmp_path), "stop"]) as process:
        until = time.monotonic() + STARTED_S
        while len(list(tmp_path.glob("*.json"))) < 4:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.2)  # the last one has only just written it
        os.kill(ours(process), signal.Signals[name])
        out, _ = process.communicate(timeout=40)
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == [
        f"saved-{rank}" for rank in range(4)
    ], out
    assert process.returncode == 0, out


def checked(folder: Path, hosts: list[str]) -> list[dict[str, Any]]:
    """What the ranks said of themselves, in their order, once it is right."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(hosts))]
    assert [rank["rank"] for rank in ranks] == list(range(len(hosts)))
    assert [rank["host"] for rank in ranks] == hosts
    assert [rank["local_rank"] for rank in ranks] == [0, 1, 0, 1]
    assert {rank["world_size"] for rank in ranks} == {4}
    assert {rank["local_world_size"] for rank in ranks} == {2}
    assert len({rank["rendezvous"] for rank in ranks}) == 1
    return ranks


def ours(process: subprocess.Popen[str]) -> int:
    """Our launcher below `process`, which enters its host and may be a job's."""
    for pid in lab.family(process.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"megatron.launch" in words and b"python" in Path(os.fsdecode(words[0])).name.encode():
            return pid
    raise AssertionError("our launcher does not run")
