"""The command that starts the ranks, by launcher: pure functions from numbers to words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


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
    exported: tuple[str, ...] = ()
    master: tuple[str, int] = ("127.0.0.1", 29500)
    left_out: tuple[str, ...] = ()
    outer: str = "mpiexec"
    python: str = "python3"


def mpiexec(launch: Launch, program: Sequence[str]) -> list[str]:
    """PALS (ALCF) and MPICH: the whole environment travels, lines arrive whole."""
    words = ["mpiexec", "--envall", "--line-buffer"]
    words += [f"--np={launch.world_size}", f"--ppn={launch.ranks_per_host}"]
    if launch.hostfile:
        words.append(f"--hostfile={launch.hostfile}")
    if launch.cpu_bind:
        words.append(f"--cpu-bind={launch.cpu_bind}")
        if launch.cpu_bind.endswith("depth") and launch.cores_per_rank:
            words.append(f"--depth={launch.cores_per_rank}")
    return [*words, *program]


def mpirun(launch: Launch, program: Sequence[str]) -> list[str]:
    """Open MPI: variables travel by name, so that no value shows in a process list."""
    words = ["mpirun", "-n", str(launch.world_size), "-N", str(launch.ranks_per_host)]
    if launch.hostfile:
        words += ["--hostfile", launch.hostfile]
    if launch.cpu_bind:
        words += ["--bind-to", launch.cpu_bind]
    for name in launch.exported:
        words += ["-x", name]
    return [*words, *program]


def srun(launch: Launch, program: Sequence[str]) -> list[str]:
    """Slurm: one rank that fails ends the step."""
    words = ["srun", "--unbuffered", "--kill-on-bad-exit=1"]
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
    if launch.num_hosts == 1:
        words += [f"--master-addr={address}", f"--master-port={port}"]
        return words + _without_python(launch, program, "--no-python")
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}"]
    once = Launch(
        world_size=launch.num_hosts,
        num_hosts=launch.num_hosts,
        ranks_per_host=1,
        hostfile=launch.hostfile,
        devices_per_host=launch.devices_per_host,
        srun_options=tuple(
            o for o in launch.srun_options if "per-task" not in o and "gpu-bind" not in o
        ),
        exported=launch.exported,
        left_out=launch.left_out,
    )
    return LAUNCHERS[launch.outer](once, words + _without_python(launch, program, "--no-python"))


def deepspeed(launch: Launch, program: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher; over several hosts it starts the ranks with MPICH."""
    address, port = launch.master
    words = [
        launch.python,
        "-m",
        "deepspeed.launcher.runner",
        f"--num_gpus={launch.ranks_per_host}",
    ]
    words += [f"--master_addr={address}", f"--master_port={port}", "--no_local_rank"]
    if launch.num_hosts > 1:
        words += [f"--hostfile={launch.hostfile}", "--launcher=MPICH"]
    return words + _without_python(launch, program, "--no_python")


def _without_python(launch: Launch, program: Sequence[str], flag: str) -> list[str]:
    """The launcher adds the interpreter itself; `flag` keeps it from doing so."""
    if program[0] == launch.python:
        return list(program[1:])
    return [flag, *program]


LAUNCHERS: dict[str, Callable[[Launch, Sequence[str]], list[str]]] = {
    "mpiexec": mpiexec,
    "mpirun": mpirun,
    "srun": srun,
    "torchrun": torchrun,
    "deepspeed": deepspeed,
}
