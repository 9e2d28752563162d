"""`python -m megatron.launch env`: what an interactive shell wants to know of its job.

ALCF/helpers.sh reads it; the names are those that ezpz's users have in their fingers.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError
from megatron.launch import launch_plan
from megatron.launch.launch_plan import LOCAL, LaunchPlan, LaunchRequest
from megatron.launch.site import Location, locate

PROGRAM = "python3"  # stands for the command that is started; left out again


def settings(environ: Mapping[str, str], location: Location) -> dict[str, str]:
    """Variables that describe the job.

    NGPU_PER_HOST and HOSTFILE are options as well, so they are given in a job only: there they are
    what a run would find itself.

    Args:
        environ: the environment's variables.
        location: machine and job.
    """
    hosts, devices = len(location.job.hosts), location.devices_per_host
    found = {
        "MACHINE": location.machine.name,
        "WORKING_DIR": working_folder(environ),
        "NHOSTS": str(hosts),
        "NGPUS": str(hosts * devices),
        "HOSTS": " ".join(location.job.hosts),
        "DIST_LAUNCH": launch_words(environ, location),
    }
    if location.job.scheduler != "none":
        if devices:
            found["NGPU_PER_HOST"] = str(devices)
        if location.job.hostfile:
            found["HOSTFILE"] = location.job.hostfile
    return found


def working_folder(environ: Mapping[str, str]) -> str:
    """Where the job was submitted, else the current folder."""
    return environ.get("PBS_O_WORKDIR") or environ.get("SLURM_SUBMIT_DIR") or os.getcwd()


def launch_words(environ: Mapping[str, str], location: Location) -> str:
    """What stands before a command to start it on every device of the job."""
    planned = _plan(environ, location)
    if planned.hostfile:
        planned.hostfile[0].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(*planned.hostfile)
    if planned.launcher == LOCAL:
        return f"python3 -m megatron.launch -n {planned.ranks} --"
    return shlex.join(planned.command[: -len((PROGRAM,))])


def _plan(environ: Mapping[str, str], location: Location) -> LaunchPlan:
    hosts, per_host = len(location.job.hosts), max(1, location.devices_per_host)
    request = LaunchRequest(
        world_size=hosts * per_host,
        num_hosts=hosts,
        ranks_per_host=per_host,
        cpu_bind=environ.get("CPU_BIND") or None,
        folder=Path(tempfile.gettempdir()) / f"megatron-launch-{location.job.id or os.getpid()}",
    )
    return launch_plan.make_plan(request, (PROGRAM,), environ, location)


def main(environ: Mapping[str, str]) -> int:
    """Print the assignments; returns the exit status."""
    try:
        found = settings(environ, locate(environ))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0
