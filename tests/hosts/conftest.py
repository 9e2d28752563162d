"""The hosts of these tests, made once; what they need and is missing is why a test is skipped."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import lab
from tests.hosts.launchers import LAUNCHERS, Launcher

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "bash tests/hosts/install.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are long, and need what not every machine has."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.Lab]:
    """`head`, n1 and n2, with ssh between them."""
    require("sshd", "ssh-keygen")
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        lab.with_sshd(made)
        yield made


@pytest.fixture(scope="session")
def slurm(hosts: lab.Lab) -> lab.Lab:
    """The same, with a Slurm."""
    require("slurmctld", "slurmd", "sbatch", "srun")
    lab.with_slurm(hosts)
    return hosts


@pytest.fixture(params=LAUNCHERS, ids=lambda launcher: launcher.name)
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    """Each launcher that is installed, on two hosts."""
    found: Launcher = request.param
    require(*found.tools)
    made: lab.Lab = request.getfixturevalue("slurm" if found.under_slurm else "hosts")
    yield found.on(made)
    if found.under_slurm:
        lab.end_jobs(made)


def two_hosts(folder: Path):  # type: ignore[no-untyped-def]
    """A lab that sees this checkout, its Python and pytest's folders."""
    require_namespaces()
    shared = [ROOT, Path(sys.prefix), Path(sys.base_prefix), folder.parent]
    return lab.lab(folder, 2, shared)


def require(*tools: str) -> None:
    """Skip where one of these commands is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: {INSTALL} (Debian)")


@functools.cache
def namespace_problem() -> str:
    """Why this machine can make no hosts; empty where it can."""
    if os.geteuid() != 0:
        return "hosts of namespaces with sshd and Slurm need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return f"ip or unshare is not installed: {INSTALL} (Debian)"
    words = ["unshare", *lab.NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    tried = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def require_namespaces() -> None:
    """Skip where there can be no hosts."""
    if problem := namespace_problem():
        pytest.skip(problem)
