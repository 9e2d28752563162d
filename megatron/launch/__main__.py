"""`python -m megatron.launch [-n N] [-ppn N] [-nh N] ... -- command`: a command on the ranks.

Also `... env` (shell.py) and `... submit` (submit.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError
from megatron.launch import launch_plan, shell, submit
from megatron.launch.command import LAUNCHERS
from megatron.launch.dialect import asker
from megatron.launch.host_check import require_hosts
from megatron.launch.launch_plan import LOCAL, LaunchPlan, LaunchRequest
from megatron.launch.local import execute
from megatron.launch.screen import Screen
from megatron.launch.site import Location, locate


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, and the command behind them."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron.launch",
        description="Runs a command as the ranks of this job; without a job, of this host.",
        epilog="`env` prints what a shell wants to know of its job, `submit` (submit --help) "
        "submits train_alcf.sh as a job.",
    )
    parser.add_argument("-n", "-np", "--nproc", type=int, metavar="N", help="total number of ranks")
    parser.add_argument("-ppn", "--nproc-per-node", type=int, metavar="N", help="ranks per host")
    parser.add_argument("-nh", "--nhosts", type=int, metavar="N", help="hosts")
    parser.add_argument("--hostfile", metavar="FILE", help="file with one host per line")
    parser.add_argument("--cpu-bind", metavar="BINDING", help="as the launcher spells it")
    parser.add_argument("--with", dest="launcher", choices=[LOCAL, *LAUNCHERS], help="launcher")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="stop with status 124 after S seconds without output",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- command")
    options = parser.parse_args(argv)
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not options.command:
        parser.error("no command: write it after --")
    return options


def topology(
    ranks: int | None, per_host: int | None, hosts: int | None, available: int, devices: int
) -> tuple[int, int, int]:
    """Ranks, hosts and ranks per host, from any of the three.

    Args:
        ranks, per_host, hosts: what the user gave.
        available: hosts of the job.
        devices: accelerators per host; 0: none.

    Raises:
        ConfigError: where they contradict each other.
    """
    if any(number is not None and number < 1 for number in (ranks, per_host, hosts)):
        raise ConfigError("-n, -ppn and -nh must be 1 or more")
    if ranks and per_host and hosts is None:
        hosts = -(-ranks // per_host)
    hosts = hosts or available
    if hosts > available:
        raise ConfigError(
            f"-nh {hosts} hosts, but there are {available}: give fewer, or more with --hostfile"
        )
    if per_host is None:
        per_host = -(-ranks // hosts) if ranks else max(1, devices)
    ranks = ranks or hosts * per_host
    if not (hosts - 1) * per_host < ranks <= hosts * per_host:
        raise ConfigError(
            f"-n {ranks} ranks do not fill {hosts} hosts of {per_host}: "
            f"{hosts} x {per_host} = {hosts * per_host}"
        )
    return ranks, hosts, per_host


def plan_of(
    options: argparse.Namespace, environ: Mapping[str, str], location: Location
) -> LaunchPlan:
    """How the command is started."""
    ranks, hosts, per_host = topology(
        options.nproc,
        options.nproc_per_node,
        options.nhosts,
        len(location.job.hosts),
        location.devices_per_host,
    )
    request = LaunchRequest(
        world_size=ranks,
        num_hosts=hosts,
        ranks_per_host=per_host,
        launcher=options.launcher,
        cpu_bind=options.cpu_bind or environ.get("CPU_BIND") or None,
        folder=Path(tempfile.gettempdir()) / f"megatron-launch-{os.getpid()}",
    )
    if options.dry_run and location.machine.is_hpc:
        return launch_plan.make_plan(request, options.command, environ, location)
    return launch_plan.make_plan(request, options.command, environ, location, ask=asker(environ))


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command; returns its status."""
    if argv[:1] == ["env"]:
        return shell.main(environ)
    if argv[:1] == ["submit"]:
        return submit.main(argv[1:], environ)
    options = parse(argv)
    given = (
        (options.hostfile, "--hostfile")
        if options.hostfile
        else (environ.get("HOSTFILE"), "HOSTFILE")
    )
    try:
        location = locate(environ, *given)
        planned = plan_of(options, environ, location)
        if options.dry_run:
            print(planned.text)
            return 0
        launch_plan.require_startable(planned)
        launch_plan.require_launcher(planned, environ)
        require_hosts(location.job)
        if planned.hostfile:
            planned.hostfile[0].parent.mkdir(parents=True, exist_ok=True)
            write_atomically(*planned.hostfile)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    with closing(Screen()) as screen:
        try:
            return execute(planned, screen, options.timeout)
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
