"""Where a command runs: job, machine, devices; and what the configuration needs of them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.config import flags, resumed
from megatron.config.errors import ConfigError
from megatron.config.resolve import Site
from megatron.launch import hostlist
from megatron.launch.accelerators import count_accelerators, memory_gib, narrowed
from megatron.launch.cpu_types import slow_types
from megatron.launch.machines import Machine, find_machine

HOSTFILE, HOSTS, DEVICE = "launch.hostfile", "launch.num_hosts", "launch.device"
PBS_NODE_FILES = Path("/var/spool/pbs/aux")


@dataclass(frozen=True)
class Job:
    """A job, or the lack of one.

    Attributes:
        scheduler: pbs, slurm or none.
        id: the scheduler's; empty without one.
        hosts: hosts to run on, the first one leads.
        hostfile: file that the hosts were read from; None where they were not.
        source: where the hosts were read from.
    """

    scheduler: str
    id: str
    hosts: tuple[str, ...]
    hostfile: str | None
    source: str


@dataclass(frozen=True)
class Location:
    """The machine and the job that a command runs in.

    Attributes:
        hostname: this host's name.
        devices_per_host: accelerators, as far as the user does not hide them; 0: none.
    """

    hostname: str
    machine: Machine
    job: Job
    devices_per_host: int


def find_job(
    environ: Mapping[str, str],
    hostname: str,
    hostfile: str | None = None,
    name: str = "HOSTFILE",
    node_files: Path = PBS_NODE_FILES,
) -> Job:
    """The job that the variables describe.

    Args:
        environ: the environment's variables.
        hostname: this host, which is all there is without a job.
        hostfile: a host file that the user gave; wins over the scheduler's.
        name: the variable or flag that gave it, for messages.
        node_files: folder where PBS keeps one host file per job.

    Raises:
        ConfigError: where a host file or a list of hosts cannot be read.
    """
    scheduler, job_id = _scheduler(environ)
    if hostfile:
        hosts = hostlist.read_hostfile(Path(hostfile), name)
        return Job(scheduler, job_id, hosts, hostfile, name)
    if scheduler == "pbs":
        for source, path in (
            ("PBS_NODEFILE", environ.get("PBS_NODEFILE")),
            ("PBS_JOBID", str(node_files / job_id) if (node_files / job_id).is_file() else None),
        ):
            if path:
                hosts = hostlist.read_hostfile(Path(path), source)
                return Job(scheduler, job_id, hosts, path, source)
    if scheduler == "slurm":
        for source in ("SLURM_JOB_NODELIST", "SLURM_NODELIST"):
            if environ.get(source):
                hosts = hostlist.expand(environ[source], source)
                return Job(scheduler, job_id, hosts, None, source)
    return Job(scheduler, job_id, (hostname,), None, "this host")


def _scheduler(environ: Mapping[str, str]) -> tuple[str, str]:
    """The scheduler and the job's id."""
    if environ.get("PBS_JOBID"):
        return "pbs", environ["PBS_JOBID"]
    if environ.get("SLURM_JOB_ID"):
        return "slurm", environ["SLURM_JOB_ID"]
    return "none", ""


def locate(
    environ: Mapping[str, str],
    hostfile: str | None = None,
    name: str = "HOSTFILE",
    hostname: str | None = None,
) -> Location:
    """Find machine, job and devices.

    Args:
        environ: the environment's variables.
        hostfile: the user's host file.
        name: what the user gave it with, for messages.
        hostname: this host's name, if not the operating system's.

    Raises:
        ConfigError: where the hosts cannot be read.
    """
    hostname = hostname or socket.gethostname()
    job = find_job(environ, hostname, hostfile, name)
    machine = find_machine(hostname, environ, job.scheduler)
    if machine.devices_per_host:
        devices = narrowed(machine.devices_per_host, machine.vendor, environ)
    elif environ.get("SLURM_GPUS_ON_NODE", "").isdecimal():
        devices = int(environ["SLURM_GPUS_ON_NODE"])
    else:
        devices = count_accelerators(environ)
    return Location(hostname, machine, job, devices)


def find_location(
    environ: Mapping[str, str], argv: Sequence[str] = (), hostname: str | None = None
) -> Location:
    """The same, with the host file that is set, and no devices where DEVICE=cpu is."""
    found = locate(environ, *_setting(environ, argv, HOSTFILE, "HOSTFILE"), hostname)
    on_cpu = _setting(environ, argv, DEVICE, "DEVICE")[0] == "cpu"
    return replace(found, devices_per_host=0) if on_cpu else found


def site(
    environ: Mapping[str, str], argv: Sequence[str] = (), location: Location | None = None
) -> Site:
    """What the configuration needs; defaults depend on how many hosts are used."""
    place = location or find_location(environ, argv)
    hosts = len(place.job.hosts)
    chosen, name = _setting(environ, argv, HOSTS, "NHOSTS")
    if chosen and chosen.isdecimal():
        if int(chosen) > hosts and place.job.source != "this host":
            raise ConfigError(
                f"{name}={int(chosen)}, but {place.job.source} has {hosts} hosts: "
                f"set {name}={hosts} or less"
            )
        hosts = int(chosen)
    return Site(
        machine=place.machine.name,
        is_hpc=place.machine.is_hpc,
        in_job=place.job.scheduler != "none",
        num_hosts=hosts,
        devices_per_host=place.devices_per_host,
        defaults=place.machine.defaults(hosts),
        device_gib=_device_gib(place),
        slow_types={} if place.devices_per_host else slow_types(environ),
    )


def _device_gib(place: Location) -> float:
    """Memory of an accelerator as the table has it, else as this host's driver says."""
    known = place.machine.device_gib
    return known or (memory_gib() if place.devices_per_host else 0.0)


def _setting(
    environ: Mapping[str, str], argv: Sequence[str], key: str, variable: str
) -> tuple[str | None, str]:
    """Value and name of an option that is needed before the others: a flag, a variable, a run's."""
    line = {option: (text, flag) for option, text, flag in flags.read_command_line(argv).settings}
    found = _given(line, environ, key, variable)
    run, name = _given(line, environ, resumed.RESUME, "RESUME")
    if found[0] is None and run:
        return resumed.value_set(run, name, key), variable
    return found


def _given(
    line: Mapping[str, tuple[str, str]], environ: Mapping[str, str], key: str, variable: str
) -> tuple[str | None, str]:
    """Value and name of what the user sets now; a flag beats the variable."""
    return line.get(key) or (environ.get(variable, "").strip() or None, variable)
