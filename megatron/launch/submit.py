"""`python -m megatron.launch submit [...] -- [VAR=value ...] [--flag value ...]`: a run as a job.

Checks the settings, writes the job script into the run's folder and gives it to qsub or sbatch,
once or as a chain of jobs of which each resumes the one before.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.config import schema, strays
from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import Resolved, Site, resolve
from megatron.launch.machines import Machine, find_machine
from megatron.plan.fit import fitted

ROOT = Path(__file__).resolve().parents[2]

# Variables of the job in which `submit` is typed, not of the one that is submitted.
OF_THIS_JOB = ("HOSTFILE", "NHOSTS", "NGPU_PER_HOST", "WORLD_SIZE", "DRY_RUN")


@dataclass(frozen=True)
class Request:
    """A job as its user describes it.

    Attributes:
        name: of the job.
        walltime: hours:minutes:seconds.
        folder: for the script and what each job prints.
        more: further directives.
    """

    name: str
    nodes: int
    walltime: str
    account: str | None
    queue: str | None
    folder: Path
    more: tuple[str, ...]


@dataclass(frozen=True)
class Scheduler:
    """How a scheduler is spoken to.

    Attributes:
        command: submits a script and prints the job's id.
        mark: begins a directive.
        directives: of a request.
        after: options that let a job wait for the end of another, however it ends.
        job: the id in what `command` prints.
    """

    command: tuple[str, ...]
    mark: str
    directives: Callable[[Request], list[str]]
    after: Callable[[str], list[str]]
    job: Callable[[str], str]


def _pbs(request: Request) -> list[str]:
    return [
        f"-N {request.name[:15]}",  # older servers take no longer names
        *([f"-A {request.account}"] if request.account else []),
        *([f"-q {request.queue}"] if request.queue else []),
        f"-l select={request.nodes}",
        f"-l walltime={request.walltime}",
        "-j oe",
        f"-o {shlex.quote(f'{request.folder}/')}",
        *request.more,
    ]


def _slurm(request: Request) -> list[str]:
    return [
        f"--job-name={request.name}",
        *([f"--account={request.account}"] if request.account else []),
        *([f"--qos={request.queue}"] if request.queue else []),
        f"--nodes={request.nodes}",
        f"--time={request.walltime}",
        f"--output={shlex.quote(f'{request.folder}/%x-%j.log')}",
        "--signal=B:USR1@300",
        *request.more,
    ]


SCHEDULERS: dict[str, Scheduler] = {
    "pbs": Scheduler(
        ("qsub",), "#PBS", _pbs, lambda job: ["-W", f"depend=afterany:{job}"], str.strip
    ),
    "slurm": Scheduler(
        ("sbatch", "--parsable"), "#SBATCH", _slurm, lambda job: [f"--dependency=afterany:{job}"],
        lambda printed: printed.strip().partition(";")[0],
    ),
}  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, and behind `--` the variables and flags of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron.launch submit",
        description="Submits train_alcf.sh as a job, with the variables and flags after `--`.",
    )
    kind = parser.add_mutually_exclusive_group()
    for name in SCHEDULERS:
        kind.add_argument(f"--{name}", dest="scheduler", action="store_const", const=name)
    parser.add_argument("-A", "--account", metavar="PROJECT", help="project that pays")
    parser.add_argument(
        "-q", "--queue", metavar="QUEUE", help="PBS: queue; Slurm: quality of service"
    )
    parser.add_argument("-N", "--nodes", type=int, default=1, metavar="N", help="hosts; default 1")
    parser.add_argument(
        "-t", "--walltime", default="1:00:00", metavar="H:M:S", help="default 1:00:00"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the job; default the run's")
    parser.add_argument(
        "--filesystems", metavar="A:B", help="PBS: file systems; default the machine's"
    )
    parser.add_argument(
        "--directive",
        action="append",
        default=[],
        metavar="TEXT",
        help="a further directive, e.g. '--directive=-l place=scatter'",
    )
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="jobs, one after another")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("run", nargs=argparse.REMAINDER, metavar="-- [VAR=value ...] [--flag ...]")
    options = parser.parse_args(argv)
    options.run = options.run[1:] if options.run[:1] == ["--"] else options.run
    if options.nodes < 1 or options.chain < 1:
        parser.error("--nodes and --chain must be 1 or more")
    if not re.fullmatch(r"\d+(:[0-5]\d){2}", options.walltime):
        parser.error(f"--walltime {options.walltime}: write hours:minutes:seconds, e.g. 6:00:00")
    return options


def variables_and_flags(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`VAR=value ... --flag value ...` -> the variables, and the flags."""
    given, left = {}, list(words)
    while left and re.match(r"[A-Za-z_]\w*=", left[0]):
        name, _, value = left.pop(0).partition("=")
        given[name] = value
    return given, left


def options_set(environ: Mapping[str, str]) -> dict[str, str]:
    """Options that are set where `submit` is typed; PBS would not carry them into the job."""
    names = schema.by_variable().keys() - {*OF_THIS_JOB}
    return {name: environ[name] for name in sorted(names) if environ.get(name, "").strip()}


def find_scheduler(
    chosen: str | None, machine: Machine, find: Callable[[str], str | None] = shutil.which
) -> str:
    """The scheduler that is asked for, the machine's, or the one that is installed.

    Raises:
        ConfigError: there is none.
    """
    installed = [name for name, entry in SCHEDULERS.items() if find(entry.command[0])]
    for name in (chosen, machine.scheduler if machine.scheduler in SCHEDULERS else None):
        if name:
            return name
    if not installed:
        raise ConfigError("submit: neither qsub nor sbatch is on PATH: give --pbs or --slurm")
    return installed[0]


def checked(
    variables: Mapping[str, str], flags: Sequence[str], nodes: int, machine: Machine, dry_run: bool
) -> Resolved:
    """The run as the job will resolve and fit it: what is wrong is found before the queue.

    Raises:
        ConfigError, DataError: as the job would.
    """
    place = Site(
        machine=machine.name,
        is_hpc=machine.is_hpc,
        num_hosts=nodes,
        devices_per_host=machine.devices_per_host,
        defaults=machine.defaults(nodes),
        device_gib=machine.device_gib,
        in_job=True,
    )
    environ = {**variables, **({"DRY_RUN": "1"} if dry_run else {})}
    found = fitted(resolve(environ, flags, place), environ, flags, place)
    if found.run.launch.num_hosts > nodes:
        raise ConfigError(
            f"NHOSTS={found.run.launch.num_hosts}, but the job has --nodes {nodes}: "
            f"give --nodes {found.run.launch.num_hosts}"
        )
    return found


def script_text(
    scheduler: Scheduler,
    request: Request,
    variables: Mapping[str, str],
    flags: Sequence[str],
    environment: str | None,
) -> str:
    """The job script.

    Args:
        scheduler: that will read it.
        request: the job.
        variables: that the run is given.
        flags: of train_alcf.sh.
        environment: folder of the virtual environment that is active; None without.
    """
    lines = ["#!/bin/bash --login"]
    lines += [f"{scheduler.mark} {words}" for words in scheduler.directives(request)]
    lines += ["", f"cd {shlex.quote(str(ROOT))} || exit"]
    if environment:
        lines.append(f"export VIRTUAL_ENV={shlex.quote(environment)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines.append(f"exec {shlex.join(['bash', 'train_alcf.sh', *flags])}")
    return "\n".join(lines) + "\n"


def submit_all(
    scheduler: Scheduler, script: Path, chain: int, say: Callable[[str], None] = print
) -> list[str]:
    """Submit the jobs of a chain, each after the one before; returns their ids.

    Raises:
        ConfigError: the scheduler refuses one; those before are submitted.
    """
    jobs: list[str] = []
    for number in range(1, chain + 1):
        after = scheduler.after(jobs[-1]) if jobs else []
        command = [*scheduler.command, *after, str(script)]
        try:
            printed = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ConfigError(f"submit: {command[0]} is not on PATH") from None
        if printed.returncode:
            raise ConfigError(
                f"submit: {shlex.join(command)} ended with status {printed.returncode}: "
                f"{printed.stderr.strip() or printed.stdout.strip()}"
                + (f" (submitted before: {' '.join(jobs)})" if jobs else "")
            )
        jobs.append(scheduler.job(printed.stdout))
        say(f"job {number} of {chain}: {jobs[-1]}")
    return jobs


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Submit, or with --dry-run print; returns the exit status."""
    options = parse(argv)
    try:
        machine = find_machine(socket.gethostname(), environ)
        scheduler = SCHEDULERS[find_scheduler(options.scheduler, machine)]
        given, flags = variables_and_flags(options.run)
        variables = {**options_set(environ), **given}
        # A slip of this shell's is none of the job's, and so nothing would tell of it there.
        strays.require_none(strays.found(environ, variables.get("IGNORE_VARIABLES")))
        found = checked(variables, flags, options.nodes, machine, options.dry_run)
        request = _request(options, machine, found.run.run_folder)
        environment = environ.get("VIRTUAL_ENV")
        text = script_text(scheduler, request, variables, flags, environment)
        for note in (*found.warnings, *found.notes):
            print(f"note: {note}", file=sys.stderr)
        if options.dry_run:
            print(text, end="")
            after = scheduler.after("<the job before>")
            for number in range(options.chain):
                command = [*scheduler.command, *(after if number else []), "<script>"]
                print(f"# {' '.join(command)}")
            return 0
        script = request.folder / time.strftime("%Y%m%d-%H%M%S.sh")
        script.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(script, text)
        print(f"job script: {script}")
        submit_all(scheduler, script, options.chain)
        return 0
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def _request(options: argparse.Namespace, machine: Machine, folder: Path) -> Request:
    """The job, with what the machine wants of every job."""
    if machine.is_hpc and not options.account:
        raise ConfigError(f"submit: {machine.name} wants a project: give -A PROJECT")
    usual = [words for words in machine.directives if "filesystems" not in words]
    systems = [words for words in machine.directives if "filesystems" in words]
    if options.filesystems:
        systems = [f"-l filesystems={options.filesystems}"]
    name = re.sub(r"[^\w.+-]", "-", options.name or folder.name)
    return Request(
        name=name if name[0].isalpha() else f"run-{name}",  # PBS: a letter first
        nodes=options.nodes,
        walltime=options.walltime,
        account=options.account,
        queue=options.queue,
        folder=(folder / "jobs").absolute(),
        more=(*usual, *systems, *options.directive),
    )
