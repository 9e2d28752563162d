"""The job this process runs in: its scheduler, its id and its hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.launch import hostlist

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
