"""The launchers as they are installed, each under the name that its machines know it by."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.hosts import lab

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Launcher:
    """A launcher on the hosts of a lab.

    Attributes:
        name: of the test's case.
        word: our word for it: LAUNCH_WITH, `--with`.
        tools: commands it needs.
        named: name on PATH -> what is meant; Debian's `mpiexec` is that of one MPI.
        under_slurm: in a job of Slurm; else in what looks like one of PBS, on its first host.
        made: the lab.
    """

    name: str
    word: str
    tools: tuple[str, ...]
    named: tuple[tuple[str, str], ...] = ()
    under_slurm: bool = False
    made: lab.Lab | None = None

    def on(self, made: lab.Lab) -> Launcher:
        """The same on these hosts."""
        folder = made.folder / "launchers" / self.name
        for name, command in self.named:
            # Not a link: hydra looks for its helpers beside the file that it was started as.
            lab.script(folder / name, f'exec {command} "$@"')
        return replace(self, made=made)

    def command(self, words: list[str]) -> tuple[str, list[str], dict[str, str]]:
        """Host, words and variables that run `words` where a job would start."""
        assert self.made is not None
        path = self.made.environ["PATH"]
        if self.named:
            path = f"{self.made.folder / 'launchers' / self.name}:{path}"
        variables = {"PATH": path, "PYTHONPATH": str(ROOT), "VIRTUAL_ENV": sys.prefix}
        if self.under_slurm:
            return lab.HEAD, ["salloc", "--quiet", "-N", "2", *words], variables
        nodes = self.made.folder / "nodes"
        nodes.write_text("n1\nn2\n", encoding="ascii")
        return "n1", words, variables | pbs(nodes)

    def launch(self, program: list[str], **environ: str) -> list[str]:
        """The words that start `program` as two ranks on each of two hosts."""
        ours = [sys.executable, "-m", "megatron.launch", "--with", self.word]
        return [*ours, "-n", "4", "-ppn", "2", "--", sys.executable, *program]

    @contextlib.contextmanager
    def started(self, program: list[str], **environ: str) -> Iterator[subprocess.Popen[str]]:
        """`program` on the four ranks, as our launcher starts it; killed at the block's end."""
        assert self.made is not None
        host, words, variables = self.command(self.launch(program))
        process = self.made.start(host, *words, cwd=ROOT, **(variables | environ))
        with lab.ended(process):
            yield process

    def run(self, program: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        with self.started(program, **environ) as process:
            out, _ = process.communicate(timeout=RUN_S)
            return subprocess.CompletedProcess(program, process.returncode, out, "")


def pbs(nodes: Path) -> dict[str, str]:
    """What PBS tells a job whose node file this is."""
    return {
        "PBS_JOBID": "1234.head",
        "PBS_NODEFILE": str(nodes),
        "PBS_O_WORKDIR": str(ROOT),
        "PBS_ENVIRONMENT": "PBS_BATCH",
    }


RUN_S = 120.0  # a probe takes 2 s
MPICH, OPEN_MPI = "mpiexec.hydra", "mpirun.openmpi"

LAUNCHERS = (
    Launcher("mpich", "mpiexec", (MPICH,), (("mpiexec", MPICH),)),
    Launcher("mpirun", "mpirun", (OPEN_MPI,), (("mpirun", OPEN_MPI),)),
    Launcher("mpiexec-of-open-mpi", "mpiexec", (OPEN_MPI,), (("mpiexec", OPEN_MPI),)),
    Launcher("slurm", "srun", (), under_slurm=True),
    Launcher("torchrun", "torchrun", (), under_slurm=True),
)
