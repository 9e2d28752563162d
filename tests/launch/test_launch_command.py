"""`python -m megatron.launch`: from any of ranks, hosts and ranks a host to the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.launch.__main__ import main, topology
from tests.launch.places import pbs_job


@pytest.mark.parametrize(
    ("ranks", "per_host", "hosts", "found"),
    [
        (None, None, None, (24, 2, 12)),
        (8, None, None, (8, 2, 4)),
        (8, 4, None, (8, 2, 4)),
        (4, 4, None, (4, 1, 4)),
        (None, 3, None, (6, 2, 3)),
        (None, None, 1, (12, 1, 12)),
        (7, 4, 2, (7, 2, 4)),
    ],
)
def test_topology_on_two_hosts_of_twelve(
    ranks: int | None, per_host: int | None, hosts: int | None, found: tuple[int, int, int]
) -> None:
    assert topology(ranks, per_host, hosts, available=2, devices=12) == found


def test_topology_without_accelerators_is_one_rank() -> None:
    assert topology(None, None, None, available=1, devices=0) == (1, 1, 1)


@pytest.mark.parametrize(
    ("ranks", "per_host", "hosts"),
    [(8, 2, 2), (16, 4, None), (None, None, 3), (2, 2, 2), (0, None, None)],
)
def test_contradictions_are_refused(
    ranks: int | None, per_host: int | None, hosts: int | None
) -> None:
    with pytest.raises(ConfigError):
        topology(ranks, per_host, hosts, available=2, devices=4)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6))
def test_the_ranks_fill_the_hosts(ranks: int, per_host: int, available: int) -> None:
    try:
        found = topology(ranks, per_host, None, available, 0)
    except ConfigError:
        assert ranks > per_host * available
        return
    assert found[0] == ranks and found[2] == per_host
    assert (found[1] - 1) * per_host < ranks <= found[1] * per_host


def test_dry_run_prints_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = pbs_job(tmp_path, "node1", "node2") | {"CPU_BIND": "cores"}
    argv = ["-ppn", "2", "--with", "mpiexec", "--dry-run", "--", "ls", "-l", "--dry-run"]
    assert main(argv, environ) == 0
    assert capsys.readouterr().out == (
        f"mpiexec --envall --np=4 --ppn=2 --hostfile={tmp_path}/nodefile "
        "-bind-to cores ls -l --dry-run\n"
    )


def test_errors_have_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-n", "2", "--hostfile", str(tmp_path / "none"), "--", "ls"], {}) == 2
    assert "--hostfile" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["-n", "2"], {})


def test_a_command_that_is_not_there_has_status_127() -> None:
    assert main(["-n", "1", "--", "/no/such/program"], {}) == 127
