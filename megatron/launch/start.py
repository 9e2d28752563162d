"""What train_alcf.sh calls: `python -m megatron.launch.start [--check] [--flag value ...]`.

Makes the configuration, writes the run's folder, starts the ranks, ends with their status.
`--check` only validates: it runs before there is an environment, on any Python >= 3.10.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # before the other imports: Ctrl-C in them leaves no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from megatron import __version__
from megatron.checkpoint.atomic import write_atomically
from megatron.config import table
from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import Resolved, resolve
from megatron.config.schema import RunConfig, read_run
from megatron.config.validate import WORLD
from megatron.display.marked_line import LIVE
from megatron.display.run_view import run_view
from megatron.launch import launch_plan, starts
from megatron.launch.claim import Say, claimed
from megatron.launch.dialect import asker
from megatron.launch.host_check import require_hosts
from megatron.launch.launch_plan import LaunchPlan, LaunchRequest
from megatron.launch.provenance import provenance
from megatron.launch.ranks import Ranks, find_ranks
from megatron.launch.retry import run_with_retries
from megatron.launch.screen import Screen
from megatron.launch.site import Location, find_location, site
from megatron.launch.text_preparation import prepare_text, require_text
from megatron.launch.versions import SINCE, compare, installed, lacking
from megatron.plan import report
from megatron.plan.fit import fitted

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "pretrain_gpt_alcf.py"
OUTPUT_FILE = "output.log"
NOTHING_TO_START = 100  # `--check` ends with it after a dry run or --help
SHOWN = ("torch", "deepspeed")
REFUSED = (2, 3, 4)  # statuses of a start that was refused: setting, data, checkpoint


def main(argv: Sequence[str], environ: Mapping[str, str], early: Sequence[int] = ()) -> int:
    """Check or start a run; returns the exit status.

    Args:
        argv: the command line without the program's name.
        environ: the environment's variables.
        early: signals that came, or come, before the ranks are started: they get them then.
    """
    only_check = argv[:1] == ["--check"]
    argv = argv[1:] if only_check else argv
    printed = NOTHING_TO_START if only_check else 0
    text = information(argv)
    if text is not None:
        print(text, end="")
        return printed
    try:
        location, resolved, planned = check(argv, environ)
        if resolved.run.log.dry_run:
            print(report.dry_run_text(resolved, _launch_text(planned)), end="")
            return printed
        if only_check:
            return 0
        launch_plan.require_launcher(planned, environ)
        resolved.warnings.extend(require_versions(installed(), resolved.run))
        return start(resolved, environ, argv, location, early)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def information(argv: Sequence[str]) -> str | None:
    """What `--help` and `--version` print; None without them."""
    if "--help" in argv or "-h" in argv:
        return table.help_text()
    if "--version" in argv:
        found = installed()
        named = {"Python": platform.python_version(), **{name: found[name] for name in SHOWN}}
        lines = (f"{name} {version}" for name, version in named.items())
        return "\n".join([f"megatron {__version__}", *lines]) + "\n"
    return None


def check(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Location, Resolved, LaunchPlan]:
    """Resolve the configuration and plan the start; a dry run may plan for another machine.

    Raises:
        ConfigError: where a setting is wrong.
        DataError: where data is wrong.
    """
    _refuse_nested(environ)
    location = find_location(environ, argv)
    place = site(environ, argv, location)
    resolved = fitted(resolve(environ, argv, place), environ, argv, place)
    planned = plan_of(resolved.run, environ, location)
    if not resolved.run.log.dry_run:
        _require_job(resolved, location)
        launch_plan.require_startable(planned)
        require_hosts(location.job)
        require_writable(resolved.run.run_folder)
        require_writable(resolved.run.checkpoint_folder)
    return location, resolved, planned


def start(
    resolved: Resolved,
    environ: Mapping[str, str],
    argv: Sequence[str],
    location: Location,
    early: Sequence[int] = (),
) -> int:
    """Own the run, start the ranks and wait until they have ended; returns their status.

    Raises:
        ConfigError: where another start owns the run, or its folder cannot be written.
    """
    config: Path | None = None

    def accepted() -> bool:
        return config is not None and starts.is_accepted(config)

    with ExitStack() as stack:
        view, why = run_view(resolved.run.log.log_style, sys.stdout)
        if view:  # else the ranks print what they have always printed
            environ = {**environ, LIVE: "1"}
        screen = Screen(resolved.run.run_folder / OUTPUT_FILE, accepted, view)
        command = shlex.join(["train_alcf.sh", *argv])
        stack.enter_context(owned(resolved.run, command, location.job.id, screen.print))
        origin = provenance(environ, argv, location, ROOT)
        if status := prepare_text(resolved.run, environ, ROOT):
            return status
        config = stack.enter_context(starts.pending(resolved, origin))
        stack.enter_context(closing(screen))
        planned = plan_of(resolved.run, environ, location)
        if planned.hostfile:
            write_atomically(*planned.hostfile)
        for line in [*_headlines(resolved, planned), *([why] if why else [])]:
            screen.print(line)
        status = run_with_retries(planned, screen, resolved.run, early=early)
        if status and status not in REFUSED:
            screen.keep()
        for line in resolved.in_vain:  # the first lines are far away by now
            screen.print(f"WARNING: {line}")
        return status


def plan_of(run: RunConfig, environ: Mapping[str, str], location: Location) -> LaunchPlan:
    """How the ranks of a run are started: on no more hosts than they fill.

    The launcher is asked which one it is, but by a dry run: that may be of another machine.
    """
    world_size = run.parallel.world_size
    per_host = min(run.launch.devices_per_host, world_size)
    request = LaunchRequest(
        world_size=world_size,
        num_hosts=min(run.launch.num_hosts, -(-world_size // per_host)),
        ranks_per_host=per_host,
        launcher=run.launch.launch_with,
        cpu_bind=run.launch.cpu_bind,
        folder=run.run_folder / starts.STARTS,
        device=run.launch.device,
    )
    config = starts.next_start(run.run_folder)
    program = (sys.executable, str(PROGRAM), "--config", str(config))
    if run.log.dry_run and location.machine.is_hpc:
        return launch_plan.make_plan(request, program, environ, location)
    return launch_plan.make_plan(request, program, environ, location, ask=asker(environ))


def print_dry_run(environ: Mapping[str, str], argv: Sequence[str], ranks: Ranks) -> bool:
    """Print what ranks that another launcher has started, or one alone, would train, once.

    Returns:
        Whether this is a dry run.

    Raises:
        ConfigError: where a setting is wrong.
        DataError: where data is wrong.
    """
    words = [*argv, f"DRY_RUN={environ['DRY_RUN']}"] if environ.get("DRY_RUN") else list(argv)
    config = argv[1] if argv[:1] == ["--config"] and len(argv) > 1 else None
    if not any("dry" in word.lower() for word in words) or (
        config and starts.is_pending(Path(config))
    ):
        return False
    environ = {**environ, "WORLD_SIZE": str(ranks.world_size)}
    argv = ["--resume", str(Path(config).parent)] if config else argv
    resolved = resolve(environ, argv, site(environ, argv, find_location(environ, argv)))
    if resolved.run.log.dry_run and ranks.rank == 0:
        command = shlex.join(["python3", PROGRAM.name, *argv])
        print(report.dry_run_text(resolved, command), end="")
    return resolved.run.log.dry_run


@contextmanager
def configuration(
    environ: Mapping[str, str], argv: Sequence[str]
) -> Iterator[tuple[RunConfig, Path | None]]:
    """The configuration of a rank, and the file that holds it: for the life of the rank.

    It is in the file of `--config`, which our launcher gives, or where another launcher has started
    the ranks it is made here, the same on every rank. Rank 0 then owns the run meanwhile.

    Raises:
        ConfigError: where a setting is wrong, or another start owns the run.
        DataError: where data is wrong.
    """
    ranks = find_ranks(environ)
    config = Path(argv[1]) if argv[:1] == ["--config"] and len(argv) > 1 else None
    if config and argv[2:]:
        raise ConfigError(f"--config FILE holds all settings: {shlex.join(argv[2:])} is not read")
    if config and (ranks.rank > 0 or starts.is_pending(config)):
        yield read_run(config), config  # rank 0, or the launcher, owns the run
        return
    location = find_location(environ, () if config else argv)
    command = shlex.join([PROGRAM.name, *argv])
    own = partial(owned, command=command, job=location.job.id, say=partial(print, file=sys.stderr))
    if config:
        run = read_run(config)
        with own(run):
            require_text(run, environ, ROOT)
            yield run, config
        return
    environ = {**environ, "WORLD_SIZE": str(ranks.world_size)}
    place = site(environ, argv, location)
    resolved = fitted(resolve(environ, argv, place), environ, argv, place)
    resolved.sources[WORLD] = f"ranks started by {ranks.family}"
    if ranks.rank > 0:
        yield resolved.run, None
        return
    print(report.messages_text(resolved), file=sys.stderr)
    origin = provenance(environ, argv, location, ROOT)
    with own(resolved.run):
        require_text(resolved.run, environ, ROOT)
        with starts.pending(resolved, origin) as config:
            yield resolved.run, config


@contextmanager
def owned(run: RunConfig, command: str, job: str, say: Say) -> Iterator[None]:
    """Own what a run writes: its folder, and that of its checkpoints, which runs may share.

    Arguments and errors as of `claimed`.
    """
    folders = {path.resolve(): path for path in (run.run_folder, run.checkpoint_folder)}
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(claimed(folder, command, job, say))
        yield


def require_writable(folder: Path) -> None:
    """Try to write, as a run will: only the file system itself knows.

    Raises:
        ConfigError: where `folder` cannot be made or written; nothing is left behind.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}: {existing}). "
            f"Set RUN_DIR or CKPT_DIR to a folder that can be"
        ) from None


def require_versions(found: Mapping[str, str | None], run: RunConfig) -> list[str]:
    """Warnings of versions that are newer than the tested ones.

    Args:
        found: package -> version, as `versions.installed` has them.
        run: what is to be run with them.

    Raises:
        ConfigError: a package is missing, too old, or lacks what the run uses.
    """
    errors, warnings = compare(found)
    schedule = run.parallel.pipeline_schedule
    if schedule in SINCE and (problem := lacking(schedule, found)):
        errors.append(f"PIPELINE_SCHEDULE={schedule} {problem}; set PIPELINE_SCHEDULE=1f1b")
    if errors:
        raise ConfigError("\n".join(errors))
    return warnings


def _launch_text(planned: LaunchPlan) -> str:
    """The launch command of a dry run, with the reason why a real run would stop."""
    if planned.problem is None:
        return planned.text
    return f"{planned.text}\nWARNING: a real run would stop here with status 2: {planned.problem}"


def _headlines(resolved: Resolved, planned: LaunchPlan) -> list[str]:
    """What is logged before the ranks start."""
    lines = [report.messages_text(resolved)]
    if resolved.run.data.data:
        lines.append(f"DATA={resolved.run.data.data}: {resolved.run.data.data_file_list}")
    if planned.added:
        words = " ".join(f"{name}={value}" for name, value in planned.added.items())
        lines.append(
            f"set for {resolved.run.machine}: {words} (your own value wins; NAME= leaves one out)"
        )
    lines.append(f"run folder: {resolved.run.run_folder}")
    lines.append(f"launch command: {planned.text}")
    return [line for line in lines if line]


def _refuse_nested(environ: Mapping[str, str]) -> None:
    """Refuse a start from within a rank: each rank would start all ranks."""
    ranks = find_ranks(environ)
    if ranks.world_size > 1:
        raise ConfigError(
            f"this is rank {ranks.rank} of {ranks.world_size} already, started by {ranks.family}: "
            f"run train_alcf.sh once, without a launcher, or give it pretrain_gpt_alcf.py"
        )


def _require_job(resolved: Resolved, location: Location) -> None:
    """Production runs do not belong on login nodes."""
    machine, run = location.machine, resolved.run
    wanted = run.launch.launch_with or run.launch.hostfile
    if machine.is_hpc and location.job.scheduler == "none" and not wanted:
        submit = "qsub -A PROJECT -q QUEUE" if machine.scheduler == "pbs" else "sbatch -A PROJECT"
        raise ConfigError(
            f"this is {machine.name} and no job: {machine.scheduler.upper()} has set no job id. "
            f"Submit it ({submit} train_alcf.sh), start it in an interactive job, "
            f"or set HOSTFILE or LAUNCH_WITH=local to run without one"
        )


if __name__ == "__main__":
    early: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: early.append(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is owned is given back
    try:
        status = main(sys.argv[1:], os.environ, early)
    except KeyboardInterrupt:
        print("interrupted: no rank was started", file=sys.stderr)
        status = 128 + signal.SIGINT
    sys.exit(status)
