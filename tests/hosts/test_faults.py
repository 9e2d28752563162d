"""What goes wrong between hosts, under real launchers: said by name, in time, and never with 0."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hosts import lab
from tests.hosts.conftest import require, two_hosts
from tests.hosts.launchers import LAUNCHERS, MPICH, ROOT, Launcher
from tests.hosts.training import TRAIN, environment

PROBE = str(Path(__file__).with_name("probe.py"))
ENDED_S = 60.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=["mpich", "mpirun"])
def mpi(request: pytest.FixtureRequest, hosts: lab.Lab) -> Launcher:
    """An MPI on two hosts."""
    found = next(launcher for launcher in LAUNCHERS if launcher.name == request.param)
    require(*found.tools)
    return found.on(hosts)


def launched(mpi: Launcher, nodes: str, folder: Path) -> tuple[int, str, float]:
    """Status, output and seconds of a probe on the hosts of this HOSTFILE."""
    assert mpi.made is not None
    host, words, variables = mpi.command(mpi.launch([PROBE, str(folder)]))
    (folder / "nodes").write_text(nodes, encoding="ascii")
    variables = {name: value for name, value in variables.items() if not name.startswith("PBS_")}
    variables["HOSTFILE"] = str(folder / "nodes")
    began = time.monotonic()
    done = mpi.made.run(host, *words, timeout=ENDED_S, cwd=ROOT, **variables)
    return done.returncode, done.stdout, time.monotonic() - began


@pytest.mark.flaky(reruns=1)
def test_a_host_that_does_not_exist(mpi: Launcher, tmp_path: Path) -> None:
    """Left to itself, Hydra starts the others and waits."""
    status, said, seconds = launched(mpi, "n1\nn9\n", tmp_path)
    assert status == 2 and seconds < 20, said
    assert said.startswith("error: HOSTFILE=") and "n9" in said
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.flaky(reruns=1)
def test_one_host_listed_twice_is_one_host(mpi: Launcher, tmp_path: Path) -> None:
    """Some sites' files have a line per rank; it is no second host."""
    status, said, seconds = launched(mpi, "n1\nn1\n", tmp_path)
    assert status == 2, said
    assert "1" in said and seconds < 10
    assert not list(tmp_path.glob("*.json"))


def test_a_port_in_use_is_named(mpi: Launcher, tmp_path: Path) -> None:
    assert mpi.made is not None
    listen = "import socket, time; s = socket.create_server(('', 29123)); time.sleep(60)"
    with lab.ended(mpi.made.start("n1", "python3", "-c", listen)):
        smoke = [str(ROOT / "tools/test_dist.py"), "--iterations", "0"]
        done = mpi.run(smoke, MASTER_PORT="29123")
    assert done.returncode != 0
    assert "29123" in "\n".join(done.stdout.splitlines()[-12:]), done.stdout


def test_the_smoke_test_on_two_hosts(mpi: Launcher) -> None:
    done = mpi.run([str(ROOT / "tools/test_dist.py"), "--iterations", "2", "--sizes", "4096"])
    assert done.returncode == 0, done.stdout
    for line in ("[rank=3/3][local_rank=1/1][node=1/1]", "  - HOSTS=['n1', 'n2']", "all right"):
        assert line in done.stdout


@pytest.mark.by_hand
def test_a_cut_cable_does_not_hang_the_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """hydra waits for ever; our launcher hears no progress, says of whom, and ends it with 124."""
    require(MPICH, "sshd")
    with two_hosts(tmp_path_factory.mktemp("cut")) as made:
        lab.with_sshd(made)
        found = next(launcher for launcher in LAUNCHERS if launcher.name == "mpich").on(made)
        host, words, variables = found.command(TRAIN)
        more = {"TRAIN_ITERS": "100000", "HANG_TIMEOUT": "20", "LAUNCH_WITH": "mpiexec"}
        environ = environment(tmp_path, **more) | variables
        log = tmp_path / "run/output.log"
        with lab.ended(made.start(host, *words, cwd=ROOT, **environ)) as process:
            until = time.monotonic() + 150
            while not log.exists() or "iteration=       3/" not in log.read_text():
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.2)
            made.cut("n2")
            out, _ = process.communicate(timeout=200)
    assert process.returncode == 124, out
    assert "hung" in out
