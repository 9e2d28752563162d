"""Four ranks, started by each launcher for real and by hand: one run, the same losses."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import lab, launchers, training
from tests.hosts.conftest import require
from tests.hosts.test_slurm import Job
from tests.hosts.training import ROOT, TRAIN, assert_same, environment, steps

COUNTED = ("torchrun", "pals", "pmix", "pmi", "hydra", "open-mpi", "slurm")
# Rank and local rank, and nothing that tells how many there are.
UNCOUNTED = {
    "pals": ("PALS_RANKID", "PALS_LOCAL_RANKID"),
    "pmix": ("PMIX_RANK", "PMIX_LOCAL_RANK"),
    "pmi": ("PMI_RANK", "PMI_LOCAL_RANK"),
    "hydra": ("PMI_RANK", "MPI_LOCALRANKID"),
    "open-mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID"),
    "torchrun": ("RANK", "LOCAL_RANK"),
}
ALSO = {"slurm": {"SLURM_STEP_ID": "0"}}
REFUSED_S = 5.0
BY_HAND_S = 500.0  # 40 s on two quiet cores

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run per family of variables, below one folder; its statuses in `said.json`."""
    folder = tmp_path_factory.mktemp("by-hand")
    environ = environment(folder, NGPU_PER_HOST="4", PYTHONPATH=str(ROOT))
    del environ["WORLD_SIZE"]
    environ |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("by_hand.py")), str(folder)],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=BY_HAND_S,
        check=True,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    (folder / "said.json").write_text(json.dumps({one["name"]: one for one in said}))
    return folder


@pytest.mark.parametrize("family", COUNTED)
def test_started_by_hand(by_hand: Path, family: str) -> None:
    said = json.loads((by_hand / "said.json").read_text())[family]
    assert said["statuses"] == [0, 0, 0, 0], (by_hand / f"{family}.txt").read_text()[-3000:]
    assert len(steps(by_hand / family)) == training.STEPS
    assert_same(by_hand / family, by_hand / "torchrun")


@pytest.mark.parametrize("family", UNCOUNTED)
def test_ranks_that_nobody_counts_do_not_train(tmp_path: Path, family: str) -> None:
    """Each of four refuses within seconds; the best of some, other work is not its own."""
    environ = environment(tmp_path)
    del environ["WORLD_SIZE"]
    times = [math.inf]
    while min(times) > REFUSED_S and len(times) < 4:
        began = time.monotonic()
        processes = [
            subprocess.Popen(
                training.PRETRAIN,
                env=environ | dict.fromkeys(UNCOUNTED[family], str(rank)) | ALSO.get(family, {}),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(4)
        ]
        for process in processes:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 2, said
            assert said.startswith("error: ") and UNCOUNTED[family][0] in said
            assert "Traceback" not in said
        times.append(time.monotonic() - began)
    assert min(times) < REFUSED_S, times
    assert not list(tmp_path.iterdir())


def test_a_job_of_slurm(slurm: lab.Lab, by_hand: Path, tmp_path: Path) -> None:
    with Job(slurm, tmp_path) as job:
        assert job.end() == "COMPLETED", job.output
    assert_same(tmp_path, by_hand / "torchrun")


def test_our_own_launcher(by_hand: Path, tmp_path: Path) -> None:
    environ = environment(tmp_path, NGPU_PER_HOST="4")
    subprocess.run(TRAIN, env=environ, cwd=ROOT, timeout=200, check=True, capture_output=True)
    assert_same(tmp_path, by_hand / "torchrun")


@pytest.mark.parametrize("name", ["mpich", "mpirun"])
def test_an_mpi_on_two_hosts_of_pbs(
    hosts: lab.Lab, by_hand: Path, tmp_path: Path, name: str
) -> None:
    """What looks like a job of PBS: node file, id, spool copy of the script."""
    found = next(launcher for launcher in launchers.LAUNCHERS if launcher.name == name)
    require(*found.tools)
    host, words, variables = found.on(hosts).command(["bash", "-l", str(spooled(tmp_path))])
    environ = environment(tmp_path, LAUNCH_WITH=found.word) | variables | {"PYTHONPATH": ""}
    done = hosts.run(host, *words, cwd=tmp_path, timeout=200, **environ)
    assert done.returncode == 0, done.stdout
    assert_same(tmp_path, by_hand / "torchrun")


@pytest.mark.parametrize("name", ["mpich", "mpirun"])
@pytest.mark.parametrize("ranks", [2])
def test_an_mpi_on_this_host(tmp_path: Path, name: str, ranks: int) -> None:
    """Without namespaces: a node file that names this host alone."""
    found = next(launcher for launcher in launchers.LAUNCHERS if launcher.name == name)
    require(*found.tools)
    for word, command in found.named:
        lab.script(tmp_path / "bin" / word, f'exec {command} "$@"')
    nodes = tmp_path / "nodes"
    nodes.write_text("localhost\n", encoding="ascii")
    environ = environment(tmp_path, LAUNCH_WITH=found.word, TRAIN_ITERS="1")
    environ |= launchers.pbs(nodes) | {"WORLD_SIZE": str(ranks), "NGPU_PER_HOST": str(ranks)}
    environ["PATH"] = f"{tmp_path / 'bin'}:{environ['PATH']}"
    words = ["bash", str(spooled(tmp_path))]
    done = subprocess.run(
        words, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["config"]["parallel"]["world_size"] == ranks


def test_torchrun_on_two_hosts_tensor_parallel_inside_pipeline_across(
    hosts: lab.Lab, by_hand: Path, tmp_path: Path
) -> None:
    """torchrun by hand on each, as its manual says: no scheduler, no launcher of ours."""
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400", "--rdzv-id=7"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    words = [*torchrun, *rendezvous, str(ROOT / "pretrain_gpt_alcf.py")]
    environ = environment(tmp_path, PP="2", DS_ACCELERATOR="cpu")
    del environ["WORLD_SIZE"]
    with (
        lab.ended(hosts.start("n1", *words, cwd=tmp_path, **environ)) as first,
        lab.ended(hosts.start("n2", *words, cwd=tmp_path, **environ)) as second,
    ):
        said = [one.communicate(timeout=200)[0] for one in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), "\n".join(said)
    assert_same(tmp_path, by_hand / "pipeline")


def spooled(folder: Path) -> Path:
    """The script as a scheduler runs it: a copy elsewhere, of another name."""
    return Path(shutil.copy(ROOT / "train_alcf.sh", folder / "7.server.SC"))
