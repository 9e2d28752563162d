"""Jobs on machines that are not here: their variables and host files."""

from __future__ import annotations

from pathlib import Path

from megatron.launch.site import Location, find_location


def pbs_job(folder: Path, *hosts: str, job: str = "123.server") -> dict[str, str]:
    """Variables of a PBS job on `hosts`; its host file is written into `folder`."""
    path = folder / "nodefile"
    path.write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")
    return {"PBS_JOBID": job, "PBS_NODEFILE": str(path)}


def slurm_job(nodes: str, job: str = "77") -> dict[str, str]:
    """Variables of a Slurm job on the hosts of a bracket list."""
    return {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": nodes}


def at(hostname: str, environ: dict[str, str]) -> Location:
    """The place that a command on `hostname` would find itself in."""
    return find_location(environ, hostname=hostname)
