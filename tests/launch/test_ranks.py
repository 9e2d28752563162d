"""A rank's numbers come whole from one launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.launch.ranks import (
    FAMILIES,
    Ranks,
    find_ranks,
    launch_id,
    meeting_point,
    rendezvous,
)
from tests.launch.places import pbs_job

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
PALS = {"PALS_RANKID": "13", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "12"}
PMI = {"PMI_RANK": "6", "PMI_LOCAL_RANK": "2", "PMI_SIZE": "8", "PMI_LOCAL_SIZE": "4"}
HYDRA = {"PMI_RANK": "6", "PMI_SIZE": "8", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
SLURM_SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
SLURM = {"SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}
PMIX = {"PMIX_RANK": "13", "PMIX_LOCAL_RANK": "1", "PMIX_NAMESPACE": "prterun-n1-77@1"}


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, Ranks(0, 0, 1, 1, "none")),
        (TORCHRUN, Ranks(5, 1, 8, 4, "torchrun")),
        (PALS | {"MEGATRON_WORLD_SIZE": "24"}, Ranks(13, 1, 24, 12, "PALS")),
        (
            {"PMIX_RANK": "3", "PMIX_LOCAL_RANK": "3", "MEGATRON_WORLD_SIZE": "4"},
            Ranks(3, 3, 4, 4, "PMIx"),
        ),
        (PMI, Ranks(6, 2, 8, 4, "PMI")),
        (HYDRA, Ranks(6, 2, 8, 4, "Hydra")),
        (OPEN_MPI, Ranks(9, 1, 16, 8, "Open MPI")),
        (SLURM, Ranks(7, 3, 8, 8, "Slurm")),
        # PALS does not tell how many there are; PMI, which is there too, does.
        (PALS | PMI, Ranks(6, 2, 8, 4, "PMI")),
        # A job's shell, and a launcher inside it.
        (SLURM_SHELL | PMI, Ranks(6, 2, 8, 4, "PMI")),
        # The user's own WORLD_SIZE is no rank variable.
        ({"WORLD_SIZE": "24"} | PMI, Ranks(6, 2, 8, 4, "PMI")),
    ],
)
def test_ranks(environ: dict[str, str], ranks: Ranks) -> None:
    assert find_ranks(environ) == ranks


@pytest.mark.parametrize("step", ["", "batch", "4294967291", "4294967290"])
def test_a_slurm_shell_is_no_rank(step: str) -> None:
    assert find_ranks(SLURM_SHELL | {"SLURM_STEP_ID": step}).family == "none"


SLURM_STEP = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}
ALL = {
    "torchrun": TORCHRUN,
    "PALS": PALS | {"PALS_APID": "5ed6"},
    "PMIx": PMIX,
    "PMI": PMI,
    "Hydra": HYDRA,
    "Open MPI": OPEN_MPI,
    "Slurm": SLURM_STEP,
}
PLACES = {"torchrun": (5, 8), "PALS": (13, 24), "PMIx": (13, 24), "PMI": (6, 8), "Hydra": (6, 8)}
PLACES |= {"Open MPI": (9, 16), "Slurm": (7, 8)}
NOISE = [
    {},
    {"WORLD_SIZE": "1"},
    {"NGPU_PER_HOST": "12"},
    SLURM_SHELL | {"SLURM_JOB_ID": "7"},
    {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "h", "PBS_JOBID": "1.s"},
]


@given(
    st.sampled_from(sorted(ALL)),
    st.sets(st.integers(0, 6)),
    st.sampled_from(NOISE),
    st.sampled_from(["0", "1", None]),
)
def test_no_rank_takes_itself_for_the_only_one(
    name: str, left_out: set[int], noise: dict[str, str], rank: str | None
) -> None:
    """Whatever variables are missing: the right place, or a refusal that names what was seen."""
    family = next(family for family in FAMILIES if family.name == name)
    full = ALL[name] | ({} if rank is None else {family.rank: rank, family.local_rank: rank})
    kept = {key: value for i, (key, value) in enumerate(full.items()) if i not in left_out}
    signs = [key for key in kept if key not in ("WORLD_SIZE", "SLURM_NODEID")]
    if name == "Slurm" and "SLURM_STEP_ID" not in kept:
        signs = []  # a shell of the job
    noise = {key: value for key, value in noise.items() if key not in ALL[name]}
    place, size = PLACES[name]
    try:
        ranks = find_ranks(noise | kept)
    except ConfigError as error:
        assert signs
        assert any(key in str(error) for key in signs)
        return
    assert ranks.family != "none" or not signs
    if signs:
        assert (ranks.rank, ranks.world_size) == (place if rank is None else int(rank), size)


@pytest.mark.parametrize("started", [PALS, PMIX, {k: v for k, v in PMI.items() if "SIZE" not in k}])
def test_the_size_is_learnt_from_the_hosts_or_the_user(
    tmp_path: Path, started: dict[str, str]
) -> None:
    job = pbs_job(tmp_path, "x1", "x2")
    assert find_ranks(job | started | {"NGPU_PER_HOST": "12"}).world_size == 24
    assert find_ranks(started | {"WORLD_SIZE": "24"}).world_size == 24
    assert find_ranks(started | {"NHOSTS": "3", "NGPU_PER_HOST": "12"}).world_size == 36
    hosts = tmp_path / "hosts"
    hosts.write_text("a\nb\nc\nd\n")
    assert find_ranks(started | {"HOSTFILE": str(hosts), "NGPU_PER_HOST": "12"}).world_size == 48
    for wrong in ({}, {"WORLD_SIZE": "6"}, {"WORLD_SIZE": "many"}):
        with pytest.raises(ConfigError):
            find_ranks(started | wrong)


def test_a_size_that_the_hosts_cannot_hold_is_refused(tmp_path: Path) -> None:
    job = pbs_job(tmp_path, "x1", "x2", "x1", "x2") | PALS
    assert find_ranks(job) == Ranks(13, 1, 24, 12, "PALS")
    assert find_ranks(job).counted == "2 hosts of PBS_NODEFILE x PALS_LOCAL_SIZE=12"
    assert find_ranks(job | {"WORLD_SIZE": "14"}).world_size == 14
    with pytest.raises(ConfigError, match="2 x 12 = 24"):
        find_ranks(job | {"WORLD_SIZE": "36"})
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=1, .*PALS_LOCAL_SIZE=12"):
        find_ranks(job | {"WORLD_SIZE": "1"})
    with pytest.raises(ConfigError, match="rank 24 of 24"):
        find_ranks(job | {"PALS_RANKID": "24"})
    with pytest.raises(ConfigError, match="NHOSTS=3, but PBS_NODEFILE has 2"):
        find_ranks(job | {"NHOSTS": "3"})


def test_a_refusal_says_what_was_seen() -> None:
    with pytest.raises(ConfigError, match=r"PALS_RANKID=13 PALS_LOCAL_RANKID=1 .*Set WORLD_SIZE"):
        find_ranks(PALS)
    with pytest.raises(ConfigError, match=r"rank 0 of 1, but PMI_RANK=6"):
        find_ranks(PMI | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})


def test_slurm_tells_the_ranks_of_each_host() -> None:
    counts = {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"}
    assert find_ranks(SLURM | counts) == Ranks(7, 1, 8, 2, "Slurm")
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE=two"):
        find_ranks(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"})


def test_slurms_pmix_does_not_make_a_rank_of_a_shell() -> None:
    shell = SLURM_SHELL | {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967290", "PMIX_RANK": "0"}
    assert find_ranks(shell | {"PMIX_NAMESPACE": "slurm.pmix.7"}).family == "none"
    with pytest.raises(ConfigError, match="PMIX_RANK=1"):
        find_ranks(shell | {"PMIX_RANK": "1"})


@given(st.permutations(["torchrun", "PMI", "Open MPI", "Slurm"]), st.integers(1, 4))
def test_numbers_are_never_mixed(order: list[str], kept: int) -> None:
    """Whatever families are set, complete or not, all numbers are those of one of them."""
    values = {"torchrun": TORCHRUN, "PMI": PMI, "Open MPI": OPEN_MPI, "Slurm": SLURM}
    environ: dict[str, str] = {}
    for name in order[:kept]:
        environ |= values[name]
    ranks = find_ranks(environ)
    family = next(family for family in FAMILIES if family.name == ranks.family)
    told = values[ranks.family]
    assert (str(ranks.rank), str(ranks.local_rank), str(ranks.world_size)) == (
        told[family.rank],
        told[family.local_rank],
        told[family.world_size],
    )


def test_half_a_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(RANK=1\), but LOCAL_RANK is not set"):
        find_ranks({"RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="MEGATRON_WORLD_SIZE=4"):
        find_ranks({"MEGATRON_WORLD_SIZE": "4"})


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="8"):
        find_ranks(TORCHRUN | {"RANK": "8"})
    with pytest.raises(ConfigError, match="24 ranks were requested, but PMI started 8"):
        find_ranks(PMI | {"MEGATRON_WORLD_SIZE": "24"})
    with pytest.raises(ConfigError, match="PMI_RANK=x"):
        find_ranks(PMI | {"PMI_RANK": "x"})


def test_meeting_point_of_the_user_wins() -> None:
    environ = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert meeting_point(environ, ("x1", "x2"), ".fast", "7") == ("head", 1234)
    for port in ("0", "65536", "-1", "http"):
        with pytest.raises(ConfigError, match="MASTER_PORT"):
            meeting_point({"MASTER_PORT": port}, ("x1",), "", "7")


def test_meeting_point_is_the_first_host_over_the_fast_network() -> None:
    address, port = meeting_point({}, ("x1.slow.org", "x2.slow.org"), ".fast.org", "7.server")
    assert address == "x1.fast.org"
    assert 1024 < port < 32768
    assert meeting_point({}, ("x1.slow.org", "x2"), "", "7.server") == ("x1.slow.org", port)
    assert meeting_point({}, ("x1", "x2"), "", "8.server")[1] != port


def test_rendezvous_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    job = pbs_job(tmp_path, "x3001c0s1b0n0", "x3002c0s1b0n0")
    found = {rendezvous(job | PMI | {"PMI_RANK": str(rank)}) for rank in range(8)}
    assert len(found) == 1
    assert found.pop().startswith("tcp://x3001c0s1b0n0:")
    assert rendezvous(TORCHRUN | {"MASTER_ADDR": "h", "MASTER_PORT": "2"}) == "tcp://h:2"


def test_a_single_process_meets_nobody_else() -> None:
    ports = {rendezvous({}) for _ in range(20)}
    assert all(re.fullmatch(r"tcp://127\.0\.0\.1:\d+", text) for text in ports)
    assert len(ports) > 1


def test_ranks_on_several_hosts_need_to_know_where_to_meet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        rendezvous(HYDRA)
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        rendezvous(PMIX | {"WORLD_SIZE": "24"})  # rank 13 with local rank 1
    assert rendezvous(HYDRA | {"MASTER_ADDR": "n1"}).startswith("tcp://n1:")
    one_host = HYDRA | {"MPI_LOCALNRANKS": "8", "MPI_LOCALRANKID": "6"}
    assert rendezvous(one_host).startswith("tcp://127.0.0.1:")


def test_a_step_on_a_part_of_its_job_meets_at_its_own_first_host() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"} | SLURM_STEP
    assert rendezvous(job).startswith("tcp://n1:")
    assert rendezvous(job | {"SLURM_STEP_NODELIST": "n[2-3]"}).startswith("tcp://n2:")


def test_launches_of_one_job_meet_at_ports_of_their_own(tmp_path: Path) -> None:
    job = pbs_job(tmp_path, "x1", "x2") | PALS
    assert rendezvous(job | {"PALS_APID": "a"}) != rendezvous(job | {"PALS_APID": "b"})


def test_launches_on_one_host_differ_by_the_process_that_started_them() -> None:
    """Between it and a rank there may be shells, one a rank."""
    code = (
        "import os; from megatron.launch.ranks import *; "
        "print(launch_id(os.environ, find_ranks(os.environ), several=False))"
    )
    environ = os.environ | {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
    direct = [sys.executable, "-c", code]
    for command in (direct, ["bash", "-c", '"$@"; true', "sh", *direct]):
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(os.getpid())
    assert launch_id({"PALS_APID": "5ed6"}, Ranks(0, 0, 4, 4, "PALS"), several=False) == "5ed6"
