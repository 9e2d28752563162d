"""Which rank this process is, and where the ranks meet, from its launcher's variables.

A rank's numbers come from ONE family of variables, never mixed: a job's shell has SLURM_* of one
task and a run inside it PMI_* of many. Needs no mpi4py.
"""

from __future__ import annotations

import random
import re
import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.config.errors import ConfigError
from megatron.launch import hostlist
from megatron.launch.machines import find_machine
from megatron.launch.site import find_job

EXPECTED = "MEGATRON_WORLD_SIZE"
"""Set by our launcher: ranks that it started. PALS and PMIx do not provide their number."""

LARGEST_STEP = 0xFFFFFFF0
"""Slurm's step ids from here on are no user's steps (batch scripts, interactive shells)."""

PORTS = range(20000, 30000)  # below those that operating systems hand out to outgoing connections


@dataclass(frozen=True)
class Family:
    """Variables of one launcher; an empty name: it has none."""

    name: str
    rank: str
    local_rank: str
    world_size: str = ""
    local_world_size: str = ""


FAMILIES = (
    Family("torchrun", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    Family("PALS", "PALS_RANKID", "PALS_LOCAL_RANKID", "", "PALS_LOCAL_SIZE"),
    Family("PMIx", "PMIX_RANK", "PMIX_LOCAL_RANK"),
    Family("PMI", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE", "PMI_LOCAL_SIZE"),
    Family("Hydra", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    Family(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Family("Slurm", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", ""),
)


@dataclass(frozen=True)
class Ranks:
    """Place of a process among those of the run.

    Attributes:
        rank: 0 .. world_size - 1.
        local_rank: 0 .. on its host.
        world_size: processes of the run.
        local_world_size: processes of the run on this host; the world size where it is unknown.
        family: the launcher whose variables were read; "none": a single process.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    family: str


def find_ranks(environ: Mapping[str, str]) -> Ranks:
    """The place of this process, from the first family of variables that is complete.

    Raises:
        ConfigError: where the numbers contradict each other, or this rank has no number.
    """
    expected = _number(environ, EXPECTED) if environ.get(EXPECTED) else None
    for family in FAMILIES:
        ranks = _read(family, environ, expected)
        if ranks is not None:
            return _checked(ranks, expected)
    _refuse_half_a_family(environ)
    if expected not in (None, 1):
        raise ConfigError(
            f"{EXPECTED}={expected} ranks were started, but no variable numbers this one: "
            f"{', '.join(family.rank for family in FAMILIES)}. Set LAUNCH_WITH=torchrun"
        )
    return Ranks(0, 0, 1, 1, "none")


def rendezvous(environ: Mapping[str, str]) -> str:
    """Where the ranks meet, as torch.distributed's `tcp://host:port`; the same on every rank.

    MASTER_ADDR and MASTER_PORT where they are set; else the job's first host and a port made from
    its id.

    Raises:
        ConfigError: for a MASTER_PORT that is no port, or hosts that cannot be read.
    """
    if find_ranks(environ).world_size == 1 and not environ.get("MASTER_PORT"):
        return f"tcp://127.0.0.1:{free_port()}"
    hostname = socket.gethostname()
    job = find_job(environ, hostname, environ.get("HOSTFILE") or None)
    machine = find_machine(hostname, environ, job.scheduler)
    address, port = meeting_point(environ, job.hosts, machine.domain, job.id)
    return f"tcp://{address}:{port}"


def meeting_point(
    environ: Mapping[str, str], hosts: Sequence[str], domain: str, key: str
) -> tuple[str, int]:
    """Address and port of rank 0.

    Args:
        environ: the environment's variables.
        hosts: hosts of the run, the first one has rank 0.
        domain: of the machine's fast network; may be empty.
        key: the port is made from it; the same on all ranks, different for each run.

    Raises:
        ConfigError: for a MASTER_PORT that is no port.
    """
    address = environ.get("MASTER_ADDR", "")
    if not address:
        alone = len(hosts) == 1
        address = (
            "127.0.0.1" if alone else hostlist.short(hosts[0]) + domain if domain else hosts[0]
        )
    text = environ.get("MASTER_PORT", "")
    if not text:
        return address, port_of(key)
    if not re.fullmatch(r"\d{1,5}", text) or not 0 < int(text) < 65536:
        raise ConfigError(f"MASTER_PORT={text} is not a port: give 1 .. 65535 or unset it")
    return address, int(text)


def port_of(key: str) -> int:
    """A port made from `key`: the same on every host, without asking."""
    return PORTS[zlib.crc32(key.encode()) % len(PORTS)]


def free_port() -> int:
    """A port of this host on which nothing listens at the moment."""
    for port in random.SystemRandom().sample(PORTS, k=100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"100 ports between {PORTS[0]} and {PORTS[-1]} were tried and all are in use")


def _read(family: Family, environ: Mapping[str, str], expected: int | None) -> Ranks | None:
    """The numbers of one family; None where it is not there or not complete."""
    if family.name == "Slurm" and not _in_step(environ):
        return None
    if not environ.get(family.rank) or not environ.get(family.local_rank):
        return None
    if environ.get(family.world_size):
        world_size = _number(environ, family.world_size)
    elif expected is not None:
        world_size = expected
    else:
        return None
    if environ.get(family.local_world_size):
        local_world_size = _number(environ, family.local_world_size)
    else:
        local_world_size = world_size
    rank, local_rank = _number(environ, family.rank), _number(environ, family.local_rank)
    return Ranks(rank, local_rank, world_size, local_world_size, family.name)


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has SLURM_PROCID and SLURM_NTASKS too."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < LARGEST_STEP


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise ConfigError(f"{name}={environ[name]} is not a number of ranks")
    return int(environ[name])


def _checked(ranks: Ranks, expected: int | None) -> Ranks:
    """The same ranks, or ConfigError where they are impossible."""
    if ranks.rank >= ranks.world_size or ranks.local_rank >= ranks.local_world_size:
        raise ConfigError(
            f"{ranks.family} gives rank {ranks.rank} of {ranks.world_size}, "
            f"local rank {ranks.local_rank} of {ranks.local_world_size}: ranks count from 0. "
            f"Unset the variables of an earlier launch"
        )
    if expected not in (None, ranks.world_size):
        raise ConfigError(
            f"{expected} ranks were requested, but {ranks.family} started {ranks.world_size}. "
            f"Set WORLD_SIZE, NHOSTS or NGPU_PER_HOST to what the job has"
        )
    return ranks


def _refuse_half_a_family(environ: Mapping[str, str]) -> None:
    """Without its local rank, each process would take itself for the only one."""
    for family in FAMILIES:
        if family.name == "Slurm" and not _in_step(environ):
            continue
        if environ.get(family.rank) and environ.get(family.world_size, "1") not in ("", "1"):
            raise ConfigError(
                f"{family.rank}={environ[family.rank]} and "
                f"{family.world_size}={environ[family.world_size]} are set, "
                f"but {family.local_rank} is not: set it, or unset {family.rank}"
            )
