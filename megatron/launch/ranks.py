"""Which rank this process is, and where the ranks meet, from its launcher's variables.

A rank's numbers come from ONE family of variables, never mixed: a job's shell has SLURM_* of one
task and a run inside it PMI_* of many. A sign of a launcher without its numbers is refused, never
taken for a single process. Needs no mpi4py.
"""

from __future__ import annotations

import os
import random
import re
import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.config.errors import ConfigError
from megatron.launch import hostlist
from megatron.launch.machines import find_machine
from megatron.launch.site import Job, find_job

EXPECTED = "MEGATRON_WORLD_SIZE"
"""Set by our launcher: ranks that it started. PALS and PMIx do not provide their number."""

LARGEST_STEP = 0xFFFFFFF0
"""Slurm's step ids from here on are no user's steps (batch scripts, interactive shells)."""

PORTS = range(20000, 30000)  # below those that operating systems hand out to outgoing connections


@dataclass(frozen=True)
class Family:
    """Variables of one launcher; an empty name: it has none. `launch` is the same on all ranks."""

    name: str
    rank: str
    local_rank: str
    world_size: str = ""
    local_world_size: str = ""
    launch: str = ""


FAMILIES = (
    Family("torchrun", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    Family("PALS", "PALS_RANKID", "PALS_LOCAL_RANKID", "", "PALS_LOCAL_SIZE", "PALS_APID"),
    Family("PMIx", "PMIX_RANK", "PMIX_LOCAL_RANK", launch="PMIX_NAMESPACE"),
    Family("PMI", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE", "PMI_LOCAL_SIZE"),
    Family("Hydra", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    Family(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_MCA_ess_base_jobid",
    ),
    Family(
        "Slurm",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NTASKS",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_STEP_ID",
    ),
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
        counted: how the world size was learnt, where no variable of the launcher holds it.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    family: str
    counted: str = field(default="", compare=False)


def find_ranks(environ: Mapping[str, str]) -> Ranks:
    """The place of this process, from the first family of variables that is complete.

    A launcher that does not tell the number of its ranks has it learnt, in this order: from
    MEGATRON_WORLD_SIZE, from the user's WORLD_SIZE, from the job's hosts times the ranks of a host.

    Raises:
        ConfigError: where the numbers contradict each other, this rank has no number, or nothing
            tells how many there are.
    """
    expected = _number(environ, EXPECTED) if environ.get(EXPECTED) else None
    families = _families(environ)
    found = (_read(family, environ, expected) for family in families)
    ranks = next((ranks for ranks in found if ranks is not None), None)
    if ranks is None:
        _refuse_half_a_family(environ, families, expected)
        family = next((family for family in families if _is_learnt(family, environ)), None)
        ranks = _learn(family, environ) if family else Ranks(0, 0, 1, 1, "none")
    ranks = _checked(ranks, expected)
    if ranks.world_size == 1:
        _refuse_alone(environ, ranks)
    return ranks


def rendezvous(environ: Mapping[str, str]) -> str:
    """Where the ranks meet, as torch.distributed's `tcp://host:port`; the same on every rank.

    MASTER_ADDR and MASTER_PORT where they are set; else the job's first host, and a port made from
    its id and the launcher's.

    Raises:
        ConfigError: for a MASTER_PORT that is no port, hosts that cannot be read, and ranks on
            several hosts where nothing tells which one is the first.
    """
    ranks = find_ranks(environ)
    if ranks.world_size == 1 and not environ.get("MASTER_PORT"):
        return f"tcp://127.0.0.1:{free_port()}"
    hostname = socket.gethostname()
    job = find_job(environ, hostname, environ.get("HOSTFILE") or None)
    if ranks.family == "Slurm" and environ.get("SLURM_STEP_NODELIST"):  # a part of the job
        name = "SLURM_STEP_NODELIST"
        job = replace(job, hosts=hostlist.expand(environ[name], name), source=name)
    machine = find_machine(hostname, environ, job.scheduler)
    several = ranks.local_world_size < ranks.world_size or ranks.local_rank != ranks.rank
    if several and len(job.hosts) == 1 and not environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"{ranks.world_size} ranks were started by {ranks.family}, {ranks.local_world_size} of "
            f"them on this host, but no variable names the other hosts, so the ranks cannot meet. "
            f"Set MASTER_ADDR to the name of rank 0's host, or HOSTFILE to a file of the hosts"
        )
    key = f"{job.id} {launch_id(environ, ranks, several=several or len(job.hosts) > 1)}".strip()
    address, port = meeting_point(environ, job.hosts, machine.domain, key)
    return f"tcp://{address}:{port}"


def launch_id(environ: Mapping[str, str], ranks: Ranks, *, several: bool) -> str:
    """What tells this launch from another one, the same on all its ranks; may be empty.

    The launcher's own id where it gives one. Else, where all ranks are on this host, the process
    that started them: the nearest ancestor without a rank's number.

    Args:
        environ: the environment's variables.
        ranks: of this process.
        several: the ranks are, or may be, on several hosts.
    """
    family = next((family for family in FAMILIES if family.name == ranks.family), None)
    if family is None:
        return ""
    given = environ.get(family.launch, "") if family.launch else ""
    return given or ("" if several else str(_starter(family.rank)))


def _starter(rank: str) -> int:
    """The nearest ancestor without the variable `rank`; the parent where this cannot be seen."""
    process, wanted = os.getppid(), f"{rank}=".encode()
    while process > 1:
        try:
            variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
        except OSError:  # another user's: a daemon; or no /proc
            break
        if not any(variable.startswith(wanted) for variable in variables):
            break
        process = int(stat.rpartition(")")[2].split()[1])
    return process


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
    if not environ.get(family.rank) or not environ.get(family.local_rank):
        return None
    if environ.get(family.world_size):
        world_size = _number(environ, family.world_size)
    elif expected is not None:
        world_size = expected
    else:
        return None
    return _ranks(family, environ, world_size)


def _ranks(family: Family, environ: Mapping[str, str], world_size: int, counted: str = "") -> Ranks:
    rank, local_rank = _number(environ, family.rank), _number(environ, family.local_rank)
    local = _local_world_size(family, environ) or world_size
    return Ranks(rank, local_rank, world_size, local, family.name, counted)


def _local_world_size(family: Family, environ: Mapping[str, str]) -> int | None:
    """Ranks on this host; None where it is unknown."""
    text = environ.get(family.local_world_size, "")
    if not text:
        return None
    if family.name != "Slurm":
        return _number(environ, family.local_world_size)
    node, counts = environ.get("SLURM_NODEID", ""), hostlist.repeated(text)
    if node.isdecimal() and int(node) < len(counts):
        return counts[int(node)]
    return counts[0] if len(set(counts)) == 1 else None


def _is_learnt(family: Family, environ: Mapping[str, str]) -> bool:
    """Whether it numbers this rank but does not count the ranks; torchrun always does."""
    numbered = environ.get(family.rank) and environ.get(family.local_rank)
    return bool(numbered) and family.name != "torchrun"


def _learn(family: Family, environ: Mapping[str, str]) -> Ranks:
    """The numbers of a family without a world size: the user's, or hosts times ranks per host.

    Raises:
        ConfigError: where neither is known, or they contradict each other.
    """
    per_host = _local_world_size(family, environ)
    name = family.local_world_size
    if per_host is None and environ.get("NGPU_PER_HOST"):
        name, per_host = "NGPU_PER_HOST", _number(environ, "NGPU_PER_HOST")
    job = find_job(environ, "", environ.get("HOSTFILE") or None)
    hosts, source = _hosts(job, environ)
    if environ.get("WORLD_SIZE"):
        size = _number(environ, "WORLD_SIZE")
        if size == 1 and per_host is None:
            raise ConfigError(
                f"WORLD_SIZE=1, but {family.name} started this rank ({_seen(environ)}), and no "
                f"variable tells that it is alone: unset WORLD_SIZE, or start it by itself"
            )
        most = hosts * per_host if hosts and per_host else None
        if (per_host and size < per_host) or (most is not None and size > most):
            limit = f"; {source} has {hosts} hosts: {hosts} x {per_host} = {most}" if most else ""
            raise ConfigError(
                f"WORLD_SIZE={size}, but {family.name} started {name}={per_host} ranks on this "
                f"host{limit}. Set WORLD_SIZE to the number of ranks that were started"
            )
        return _ranks(family, environ, size, f"WORLD_SIZE={size}")
    if hosts and per_host:
        counted = f"{hosts} hosts of {source} x {name}={per_host}"
        return _ranks(family, environ, hosts * per_host, counted)
    raise ConfigError(
        f"{family.name} started this rank ({_seen(environ)}), but no variable tells how many there "
        f"are, and without it each would train alone. Set WORLD_SIZE to the number of ranks, start "
        f"it in a job whose hosts are known with {name or 'NGPU_PER_HOST'}, "
        f"or use bash train_alcf.sh, which tells its ranks"
    )


def _hosts(job: Job, environ: Mapping[str, str]) -> tuple[int, str]:
    """Hosts that the ranks are on, and who says so; 0 where nobody does."""
    known = 0 if job.source == "this host" else len(job.hosts)
    if environ.get("NHOSTS"):
        wanted = _number(environ, "NHOSTS")
        if known and wanted > known:
            raise ConfigError(f"NHOSTS={wanted}, but {job.source} has {known} hosts")
        return wanted, "NHOSTS"
    return known, job.source


def _families(environ: Mapping[str, str]) -> list[Family]:
    """Those whose variables mean a rank here.

    Slurm gives a job's shell the variables of its one task; so does its PMIx, which numbers it 0.
    """
    if in_step(environ):
        return list(FAMILIES)
    no_rank = {"Slurm"}
    if environ.get("PMIX_NAMESPACE", "").startswith("slurm.") and environ.get("PMIX_RANK") == "0":
        no_rank.add("PMIx")
    return [family for family in FAMILIES if family.name not in no_rank]


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether this is a user's step; a batch script has SLURM_PROCID and SLURM_NTASKS too."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < LARGEST_STEP


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise ConfigError(f"{name}={environ[name]} is not a number of ranks")
    return int(environ[name])


def _checked(ranks: Ranks, expected: int | None) -> Ranks:
    """The same ranks, or ConfigError where they are impossible."""
    fits = ranks.local_rank < ranks.local_world_size <= ranks.world_size
    if ranks.rank >= ranks.world_size or not fits:
        counted = f" ({ranks.counted})" if ranks.counted else ""
        raise ConfigError(
            f"{ranks.family} gives rank {ranks.rank} of {ranks.world_size}{counted}, "
            f"local rank {ranks.local_rank} of {ranks.local_world_size}: ranks count from 0. "
            f"Unset the variables of an earlier launch"
        )
    if expected not in (None, ranks.world_size):
        raise ConfigError(
            f"{expected} ranks were requested, but {ranks.family} started {ranks.world_size}. "
            f"Set WORLD_SIZE, NHOSTS or NGPU_PER_HOST to what the job has"
        )
    return ranks


def _refuse_half_a_family(
    environ: Mapping[str, str], families: Sequence[Family], expected: int | None
) -> None:
    """Where something was launched, but a rank has no number, each would train alone."""
    if any(_is_learnt(family, environ) for family in families):
        return
    seen = _seen(environ)
    if expected not in (None, 1):
        raise ConfigError(
            f"{EXPECTED}={expected} ranks were started, but no variable numbers this one: "
            f"{', '.join(family.rank for family in FAMILIES)}"
            + (f" (seen: {seen})" if seen else "")
            + ". Set LAUNCH_WITH=torchrun"
        )
    if not seen:
        return
    signs = set(_signs(environ))
    family = max(families, key=lambda family: len(signs & set(_names(family))))
    missing = [
        name
        for name in (family.rank, family.local_rank, family.world_size)
        if name and not environ.get(name)
    ]
    raise ConfigError(
        f"a launcher started this process ({seen}), but {' and '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not set, and without it each rank would train "
        f"alone. Set it, or unset {', '.join(sorted(signs))} where they are of an earlier launch"
    )


def _refuse_alone(environ: Mapping[str, str], ranks: Ranks) -> None:
    """A world of one rank beside a rank's number above 0 is not believed."""
    for family in _families(environ):
        if environ.get(family.rank) and _number(environ, family.rank) > 0:
            raise ConfigError(
                f"{ranks.family} gives rank 0 of 1, but {family.rank}={environ[family.rank]} is "
                f"set as well ({_seen(environ)}). Unset the variables of an earlier launch"
            )


def _names(family: Family) -> list[str]:
    """Its variables that nobody but a launcher sets."""
    names = (family.rank, family.local_rank, family.world_size, family.local_world_size)
    return [name for name in (*names, family.launch) if name not in ("", "WORLD_SIZE")]


def _signs(environ: Mapping[str, str]) -> list[str]:
    """Variables that only a launched process has."""
    names = [name for family in _families(environ) for name in _names(family) if environ.get(name)]
    return list(dict.fromkeys(names))


def _seen(environ: Mapping[str, str]) -> str:
    """The variables of launchers that are set, for messages."""
    return " ".join(f"{name}={environ[name]}" for name in _signs(environ))
