"""The command that starts the ranks, by launcher: pure functions from numbers to words."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

PALS, HYDRA, INTEL, OPEN_MPI = "PALS", "Hydra", "Intel MPI", "Open MPI"


@dataclass(frozen=True)
class Launch:
    """Numbers and options that a launcher command is made of.

    Attributes:
        world_size: total number of ranks.
        num_hosts: hosts that they run on.
        ranks_per_host: ranks on a full host.
        hostfile: file with one host per line; None: the launcher knows the hosts.
        devices_per_host: accelerators per host; 0: none.
        cpu_bind: as the launcher spells it; None: its own.
        cores_per_rank: for bindings by depth or by task; 0: not given.
        srun_options: further options of srun; `{devices}` stands for devices_per_host.
        dialect: which MPI's mpiexec or mpirun it is, a name of DIALECTS.
        in_step: this is a step of Slurm already, whose cores are shared.
        exported: names of variables that Open MPI carries to other hosts.
        master: address and port of rank 0.
        left_out: hosts of the job that are not used, for launchers without a host file.
        outer: launcher that starts torchrun once per host, where there are several.
        python: interpreter that runs torchrun's and DeepSpeed's launchers.
    """

    world_size: int
    num_hosts: int
    ranks_per_host: int
    hostfile: str | None = None
    devices_per_host: int = 0
    cpu_bind: str | None = None
    cores_per_rank: int = 0
    srun_options: tuple[str, ...] = ()
    dialect: str = HYDRA
    in_step: bool = False
    exported: tuple[str, ...] = ()
    master: tuple[str, int] = ("127.0.0.1", 29500)
    left_out: tuple[str, ...] = ()
    outer: str = "mpiexec"
    python: str = "python3"


def pals(launch: Launch, name: str) -> list[str]:
    """HPE's, of ALCF: the whole environment travels, lines arrive whole."""
    words = [name, "--envall", "--line-buffer"]
    words += [f"--np={launch.world_size}", f"--ppn={launch.ranks_per_host}"]
    if launch.hostfile:
        words.append(f"--hostfile={launch.hostfile}")
    if launch.cpu_bind:
        words.append(f"--cpu-bind={launch.cpu_bind}")
        if launch.cpu_bind.endswith("depth") and launch.cores_per_rank:
            words.append(f"--depth={launch.cores_per_rank}")
    return words


def hydra(launch: Launch, name: str) -> list[str]:
    """MPICH's; PALS takes these words as well."""
    words = [name, "--envall", f"--np={launch.world_size}", f"--ppn={launch.ranks_per_host}"]
    if launch.hostfile:
        words.append(f"--hostfile={launch.hostfile}")
    if launch.cpu_bind:
        words += ["-bind-to", launch.cpu_bind]
    return words


def intel(launch: Launch, name: str) -> list[str]:
    """Intel's hydra: in a job it would take the ranks of a host from the scheduler."""
    words = [name, "-genvall", "-genv", "I_MPI_JOB_RESPECT_PROCESS_PLACEMENT", "0"]
    words += ["-n", str(launch.world_size), "-ppn", str(launch.ranks_per_host)]
    if launch.hostfile:
        words += ["-f", launch.hostfile]
    if launch.cpu_bind:
        words += ["-genv", "I_MPI_PIN_DOMAIN", launch.cpu_bind]
    return words


def open_mpi(launch: Launch, name: str) -> list[str]:
    """Variables travel by name, so that no value shows in a process list."""
    words = [name, "-n", str(launch.world_size), "-N", str(launch.ranks_per_host)]
    if launch.hostfile:
        words += ["--hostfile", launch.hostfile]
    if launch.cpu_bind:
        words += ["--bind-to", launch.cpu_bind]
    for variable in launch.exported:
        words += ["-x", variable]
    return words


# DeepSpeed's words for them.
DEEPSPEED = {PALS: "MPICH", HYDRA: "MPICH", INTEL: "IMPI", OPEN_MPI: "OPENMPI"}

DIALECTS = {PALS: pals, HYDRA: hydra, INTEL: intel, OPEN_MPI: open_mpi}


def mpiexec(launch: Launch, program: Sequence[str]) -> list[str]:
    """The MPI's of `launch.dialect`."""
    return [*DIALECTS[launch.dialect](launch, "mpiexec"), *program]


def mpirun(launch: Launch, program: Sequence[str]) -> list[str]:
    """The same under its other name."""
    return [*DIALECTS[launch.dialect](launch, "mpirun"), *program]


def srun(launch: Launch, program: Sequence[str]) -> list[str]:
    """Slurm: one rank that fails ends the step.

    The variables are ours, whatever `sbatch --export` has kept from the job. Ranks count host by
    host, so that tensor-parallel ones share a host. Lines arrive whole, as without --unbuffered.
    """
    words = ["srun", "--export=ALL", "--kill-on-bad-exit=1", "--distribution=block"]
    words += ["--overlap"] if launch.in_step else []
    words += [f"--nodes={launch.num_hosts}", f"--ntasks={launch.world_size}"]
    words.append(f"--ntasks-per-node={launch.ranks_per_host}")
    if launch.left_out:
        words.append(f"--exclude={','.join(launch.left_out)}")
    for option in launch.srun_options:
        if launch.devices_per_host or "{devices}" not in option:
            words.append(option.format(devices=launch.devices_per_host))
    if launch.cores_per_rank:
        words.append(f"--cpus-per-task={launch.cores_per_rank}")
    if launch.cpu_bind:
        words.append(f"--cpu-bind={launch.cpu_bind}")
    return [*words, *program]


def torchrun(launch: Launch, program: Sequence[str]) -> list[str]:
    """torchrun, started once per host by `launch.outer` where there are several."""
    address, port = launch.master
    words = [launch.python, "-m", "torch.distributed.run", f"--nnodes={launch.num_hosts}"]
    words.append(f"--nproc-per-node={launch.ranks_per_host}")
    words.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    if launch.num_hosts == 1:
        words += [f"--master-addr={address}", f"--master-port={port}"]
        return words + _without_python(launch, program, "--no-python")
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}"]
    once = replace(
        launch,
        world_size=launch.num_hosts,
        ranks_per_host=1,
        cpu_bind=None,
        cores_per_rank=0,
        srun_options=tuple(
            o for o in launch.srun_options if "per-task" not in o and "gpu-bind" not in o
        ),
    )
    return LAUNCHERS[launch.outer](once, words + _without_python(launch, program, "--no-python"))


def deepspeed(launch: Launch, program: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher; over several hosts it starts the ranks with mpirun."""
    address, port = launch.master
    words = [launch.python, "-m", "deepspeed.launcher.runner"]
    if launch.num_hosts == 1:  # over several hosts it takes the slots of the host file, no limit
        words.append(f"--num_gpus={launch.ranks_per_host}")
    words += [f"--master_addr={address}", f"--master_port={port}", "--no_local_rank"]
    if launch.num_hosts > 1:
        words += [f"--hostfile={launch.hostfile}", f"--launcher={DEEPSPEED[launch.dialect]}"]
    return words + _without_python(launch, program, "--no_python")


def _without_python(launch: Launch, program: Sequence[str], flag: str) -> list[str]:
    """The launcher adds the interpreter itself; `flag` keeps it from doing so."""
    if program[0] == launch.python:
        return list(program[1:])
    return [flag, *program]


_TERM, _INT, _HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
_USR1, _USR2 = signal.SIGUSR1, signal.SIGUSR2

SIGNALS: dict[str, dict[int, int]] = {
    HYDRA: {_HUP: _TERM},
    INTEL: {_HUP: _TERM},
    OPEN_MPI: {_TERM: _USR1, _INT: _USR1, _HUP: _USR1},  # kills the ranks 2 s after the others
    "srun": {_TERM: _USR1, _INT: _USR1, _HUP: _USR1},  # kills the ranks at once at the others
    "torchrun": {_TERM: _USR1, _INT: _USR1, _HUP: _USR1, _USR2: 0},  # srun may be before it
    "deepspeed": {_USR1: _TERM, _USR2: 0, _HUP: _TERM},
}
"""Launcher or dialect -> signal that it does not pass on to the ranks -> one that it does; 0: none.

All of them ask the ranks to save and stop.
"""

ALIASES = {"MPICH": "mpiexec"}
"""Words of others for a launcher -> ours."""

LAUNCHERS: dict[str, Callable[[Launch, Sequence[str]], list[str]]] = {
    "mpiexec": mpiexec,
    "mpirun": mpirun,
    "srun": srun,
    "torchrun": torchrun,
    "deepspeed": deepspeed,
}
