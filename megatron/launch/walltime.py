"""When the walltime of this process' job ends, as Slurm or PBS says; asked once, within seconds."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
NO_LIMIT = ("NONE", "N/A", "UNKNOWN", "UNLIMITED", "NOT_SET", "INVALID")  # Slurm's words for it

RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


def job_end(environ: Mapping[str, str], run: RunCommand = subprocess.run) -> float | None:
    """Seconds since the epoch at which the scheduler ends this job.

    None without a job, without a limit, and where the scheduler gives no answer, which is logged.

    Args:
        environ: the environment's variables.
        run: starts a command of the scheduler.
    """
    job = environ.get("PBS_JOBID") or environ.get("SLURM_JOB_ID")
    if not job:
        return None
    try:
        if environ.get("PBS_JOBID"):
            end = _pbs_end(environ, job, run)
        else:
            end = _slurm_end(environ, job, run)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning(f"the walltime of job {job} is not known ({error}): no stop before its end")
        return None
    if end is not None and end <= time.time():
        log.warning(f"job {job} should have ended {time.time() - end:.0f} s ago: not believed")
        return None
    return end


def _slurm_end(environ: Mapping[str, str], job: str, run: RunCommand) -> float | None:
    """From the variable of newer releases, else from squeue, else from scontrol."""
    given = environ.get("SLURM_JOB_END_TIME", "")
    if given.isdecimal() and int(given) > 0:
        return float(given)
    environ = {**environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        lines = _output(run, environ, "squeue", "-h", "-j", job, "-o", "%e").split()
        return _slurm_time(lines[0] if lines else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        shown = _output(run, environ, "scontrol", "show", "job", job)
    found = re.search(r"\bEndTime=(\S*)", shown)
    if not found:
        raise ValueError("scontrol shows no EndTime")
    return _slurm_time(found[1])


def _slurm_time(text: str) -> float | None:
    """`2026-05-01T12:00:00` is local time."""
    if text.upper() in NO_LIMIT:
        return None
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def _pbs_end(environ: Mapping[str, str], job: str, run: RunCommand) -> float | None:
    """Start and walltime of the job.

    The text of `qstat -f` is what all kinds of PBS have. Its JSON is broken in some releases by
    variables of the job, and the walltime used so far lags by minutes.
    """
    shown = _output(run, environ, "qstat", "-f", job)
    started = _attribute(shown, "stime") or _attribute(shown, "start_time")  # PBS, Torque
    limit = _attribute(shown, "Resource_List.walltime") or environ.get("PBS_WALLTIME", "")
    if not limit:
        return None
    if not started:
        raise ValueError("qstat -f shows no start time")
    return time.mktime(time.strptime(started, "%a %b %d %H:%M:%S %Y")) + _seconds(limit)


def _attribute(shown: str, name: str) -> str:
    """Value of an attribute in the text of `qstat -f`; empty where there is none."""
    found = re.search(rf"^\s*{re.escape(name)} = (.*)$", shown, re.MULTILINE)
    return found[1].strip() if found else ""


def _seconds(text: str) -> float:
    """`100:00:00`, `30:00` or `3600`."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _output(run: RunCommand, environ: Mapping[str, str], *command: str) -> str:
    """What a command prints; an error where it fails or is slow."""
    done = run(
        command,
        env={**environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return str(done.stdout)
