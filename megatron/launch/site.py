"""Where a run would start: machine, job, devices; and what the configuration needs of them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.config import flags
from megatron.config.errors import ConfigError
from megatron.config.resolve import Site
from megatron.launch.accelerators import count_accelerators, narrowed
from megatron.launch.machines import Machine, find_machine
from megatron.launch.scheduler import Job, find_job

HOSTFILE, HOSTS = "launch.hostfile", "launch.num_hosts"


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
        devices = narrowed(machine.devices_per_host, None, environ)
    elif environ.get("SLURM_GPUS_ON_NODE", "").isdecimal():
        devices = int(environ["SLURM_GPUS_ON_NODE"])
    else:
        devices = count_accelerators(environ)
    return Location(hostname, machine, job, devices)


def find_location(
    environ: Mapping[str, str], argv: Sequence[str] = (), hostname: str | None = None
) -> Location:
    """The same, with the host file that variables or flags name."""
    given = _setting(environ, argv, HOSTFILE, "HOSTFILE")
    return (
        locate(environ, *given, hostname=hostname) if given else locate(environ, hostname=hostname)
    )


def site(
    environ: Mapping[str, str], argv: Sequence[str] = (), location: Location | None = None
) -> Site:
    """What the configuration has to know; defaults depend on how many hosts are used."""
    place = location or find_location(environ, argv)
    hosts = len(place.job.hosts)
    chosen = _setting(environ, argv, HOSTS, "NHOSTS")
    if chosen and chosen[0].isdecimal():
        wanted = int(chosen[0])
        if wanted > hosts and place.job.source != "this host":
            raise ConfigError(
                f"{chosen[1]}={wanted}, but {place.job.source} has {hosts} hosts: "
                f"set {chosen[1]}={hosts} or less"
            )
        hosts = wanted
    return Site(
        machine=place.machine.name,
        is_hpc=place.machine.is_hpc,
        num_hosts=hosts,
        devices_per_host=place.devices_per_host,
        defaults=place.machine.defaults(hosts),
    )


def _setting(
    environ: Mapping[str, str], argv: Sequence[str], key: str, variable: str
) -> tuple[str, str] | None:
    """Value and name of an option that is needed before the others; a flag beats the variable."""
    for option, text, flag in flags.read_command_line(argv).settings:
        if option == key:
            return text, flag
    value = environ.get(variable, "").strip()
    return (value, variable) if value else None
