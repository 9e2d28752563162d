"""What train_alcf.sh calls: `python -m megatron.launch.start [--check] [--flag value ...]`.

Makes the configuration, writes the run's folder, starts the ranks, ends with their status.
`--check` only validates: it runs before there is an environment, on any Python >= 3.10.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron.checkpoint.atomic import write_atomically
from megatron.config import table
from megatron.config.deepspeed import deepspeed_config
from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import Resolved, resolve
from megatron.config.schema import RUN_FILE, RunConfig
from megatron.launch import launch_plan, provenance
from megatron.launch.launch_plan import LaunchPlan, LaunchRequest
from megatron.launch.local import Screen
from megatron.launch.ranks import find_ranks
from megatron.launch.retry import run_with_retries
from megatron.launch.site import Location, find_location, site
from megatron.plan import report

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "pretrain_gpt_alcf.py"
OUTPUT_FILE = "output.log"
DEEPSPEED_FILE = "ds_config.json"
NOTHING_TO_START = 100  # `--check` ends with it after a dry run or --help


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Check or start a run; returns the exit status."""
    only_check = argv[:1] == ["--check"]
    argv = argv[1:] if only_check else argv
    printed = NOTHING_TO_START if only_check else 0
    if "--help" in argv or "-h" in argv:
        print(table.help_text(), end="")
        return printed
    try:
        location, resolved, planned = check(argv, environ)
        if resolved.run.log.dry_run:
            print(report.dry_run_text(resolved, _launch_text(planned)), end="")
            return printed
        if only_check:
            return 0
        launch_plan.require_launcher(planned, shutil.which)
        write_run(resolved, provenance.provenance(environ, argv, location, ROOT))
        return start(resolved, planned)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def check(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Location, Resolved, LaunchPlan]:
    """Resolve the configuration and plan the start; a dry run may plan for another machine.

    Raises:
        ConfigError: where a setting is wrong.
        DataError: where data is wrong.
    """
    _refuse_nested(environ)
    location = find_location(environ, argv)
    resolved = resolve(environ, argv, site(environ, argv, location))
    planned = plan_of(resolved.run, environ, location)
    if not resolved.run.log.dry_run:
        _require_job(resolved, location)
        launch_plan.require_startable(planned)
        require_writable(resolved.run.run_folder)
        require_writable(resolved.run.checkpoint_folder)
    return location, resolved, planned


def start(resolved: Resolved, planned: LaunchPlan) -> int:
    """Start the ranks and wait until they have ended; returns their status."""
    if planned.hostfile:
        write_atomically(*planned.hostfile)
    with closing(Screen(resolved.run.run_folder / OUTPUT_FILE)) as screen:
        for line in _headlines(resolved, planned):
            screen.print(line)
        return run_with_retries(planned, screen, resolved.run)


def plan_of(run: RunConfig, environ: Mapping[str, str], location: Location) -> LaunchPlan:
    """How the ranks of a run are started: on no more hosts than they fill."""
    world_size = run.parallel.world_size
    per_host = min(run.launch.devices_per_host, world_size)
    request = LaunchRequest(
        world_size=world_size,
        num_hosts=min(run.launch.num_hosts, -(-world_size // per_host)),
        ranks_per_host=per_host,
        launcher=run.launch.launch_with,
        cpu_bind=run.launch.cpu_bind,
        folder=run.run_folder,
    )
    program = (sys.executable, str(PROGRAM), "--config", str(run.run_folder / RUN_FILE))
    return launch_plan.make_plan(request, program, environ, location)


def prepare_run(environ: Mapping[str, str], argv: Sequence[str]) -> RunConfig:
    """The configuration of a run that another launcher has started: the same on every rank.

    Rank 0 writes the run's folder.

    Raises:
        ConfigError: where a setting is wrong.
        DataError: where data is wrong.
    """
    ranks = find_ranks(environ)
    environ = {**environ, "WORLD_SIZE": str(ranks.world_size)}
    location = find_location(environ, argv)
    resolved = resolve(environ, argv, site(environ, argv, location))
    if ranks.rank == 0:
        print(report.messages_text(resolved), file=sys.stderr)
        write_run(resolved, provenance.provenance(environ, argv, location, ROOT))
    return resolved.run


def write_run(resolved: Resolved, origin: Mapping[str, Any]) -> None:
    """Make the run's folder and write what it was started with, its provenance `origin` included.

    Raises:
        ConfigError: where the folder cannot be written.
    """
    run, folder = resolved.run, resolved.run.run_folder
    record = {
        "config": run.to_dict(),
        "sources": [f"{key}: {source}" for key, source in sorted(resolved.sources.items())],
        "provenance": dict(origin),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in ((DEEPSPEED_FILE, deepspeed_config(run)), (RUN_FILE, record)):
            write_atomically(folder / name, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"the run's folder cannot be written: {error}. Set RUN_DIR to a folder that can be"
        ) from None


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


def _launch_text(planned: LaunchPlan) -> str:
    """The launch command of a dry run, with the reason why a real run would stop."""
    if planned.problem is None:
        return planned.text
    return f"{planned.text}\nWARNING: a real run would stop here with status 2: {planned.problem}"


def _headlines(resolved: Resolved, planned: LaunchPlan) -> list[str]:
    """What is logged before the ranks start."""
    lines = [report.messages_text(resolved)]
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
    sys.exit(main(sys.argv[1:], os.environ))
