"""A rank's numbers come whole from one launcher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.launch.ranks import FAMILIES, Ranks, find_ranks, meeting_point, rendezvous
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
    with pytest.raises(ConfigError, match=r"RANK=1 and WORLD_SIZE=2 .*LOCAL_RANK is not"):
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
