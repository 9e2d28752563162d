"""Each launcher, for real, on two hosts: who the ranks are, where they meet, what they are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hosts.launchers import Launcher

PROBE = str(Path(__file__).with_name("probe.py"))
CARRIED = {"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth0", "CCL_KVS_MODE": "mpi", "FI_LOG": "1"}


def test_ranks_hosts_and_variables(launcher: Launcher, tmp_path: Path) -> None:
    done = launcher.run([PROBE, str(tmp_path)], **CARRIED)
    assert done.returncode == 0, done.stdout
    said = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    ranks = [said[str(rank)] for rank in range(4)]
    assert [rank["rank"] for rank in ranks] == [0, 1, 2, 3]
    assert [rank["host"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert [rank["local_rank"] for rank in ranks] == [0, 1, 0, 1]
    assert {rank["world_size"] for rank in ranks} == {4}
    assert {rank["local_world_size"] for rank in ranks} == {2}
    assert len({rank["rendezvous"] for rank in ranks}) == 1
    for rank in ranks:
        assert CARRIED.items() <= rank["environ"].items()
        assert rank["environ"]["DS_ACCELERATOR"] == "cpu"  # the launcher's own, not the user's
    lines = [line for line in done.stdout.splitlines() if "is there" in line]
    assert sorted(lines) == [f"rank {rank} of 4 is there" for rank in range(4)]


@pytest.mark.parametrize("failing", [0, 3])
@pytest.mark.parametrize("how", ["3", "traceback", "kill"])
def test_the_failing_ranks_error_is_last(
    launcher: Launcher, tmp_path: Path, failing: int, how: str
) -> None:
    done = launcher.run([PROBE, str(tmp_path), "fail", str(failing), how])
    end = "\n".join(done.stdout.strip().splitlines()[-12:])
    status = {"3": 3, "traceback": 1, "kill": 137}[how]
    words = {"3": "found wrong", "traceback": "did wrong", "kill": "SIGKILL"}[how]
    assert done.returncode == status, done.stdout
    assert words in end, done.stdout
    assert f"rank {failing}" in end
