"""Starts the ranks and follows them to their end: what they print, and why the first one failed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from megatron.launch import failure, process
from megatron.launch.launch_plan import LOCAL, LaunchPlan
from megatron.launch.ranks import EXPECTED, free_port
from megatron.launch.screen import Screen


def usable_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform.startswith("linux"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def rank_environment(
    environ: Mapping[str, str], rank: int, ranks: int, port: int, cores: int
) -> dict[str, str]:
    """Variables of one rank.

    Args:
        environ: variables to start from; OMP_NUM_THREADS and MASTER_* in them stay.
        rank: 0 .. ranks - 1.
        ranks: processes of the run, all on this host.
        port: of rank 0.
        cores: cores that the ranks share.
    """
    loopback = "lo" if sys.platform.startswith("linux") else "lo0"
    defaults = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        # Threads that spin while they wait make a busy host several times slower.
        "OMP_WAIT_POLICY": "passive",
        "GLOO_SOCKET_IFNAME": loopback,  # a laptop's host name often leads nowhere
        "PYTHONUNBUFFERED": "1",
    }
    numbers = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        EXPECTED: str(ranks),
    }
    return (
        defaults
        | {name: value for name, value in environ.items() if value or name not in defaults}
        | numbers
    )


def execute(planned: LaunchPlan, screen: Screen, idle_timeout_s: float | None = None) -> int:
    """Start what was planned, and wait until the last process has ended.

    Returns:
        0 where all ended with 0; the status of the launcher, or of the rank that failed first,
        whose error is then the last thing on the screen; 124 where nothing was printed for
        `idle_timeout_s` seconds.
    """
    command, environ, started = planned.command, planned.environ, planned.launcher
    children = [process.Child(command, environ)]
    if planned.launcher == LOCAL:
        started, ranks, port, cores = "ranks", planned.ranks, free_port(), usable_cores()
        children = [
            process.Child(command, rank_environment(environ, rank, ranks, port, cores))
            for rank in range(ranks)
        ]
    watched = process.watch(children, screen.line, idle_timeout_s=idle_timeout_s)
    if watched.hung:
        screen.print(f"no output for {idle_timeout_s:g} s: {started} stopped", is_error=True)
        return process.HUNG
    return print_failure(watched, screen)


def print_failure(watched: process.Watched, screen: Screen) -> int:
    """Print why the first rank failed, unless it alone printed it just now; returns its status."""
    first = failure.first_failure(watched.ended)
    if first is None:
        return 0
    end = watched.ended[first]
    if end.stopped:  # we were quicker than its own end
        end = min((other for other in watched.ended if other.status), key=lambda other: other.at)
    if end.status - 128 in watched.signals or watched.signals.count(signal.SIGINT) > 2:
        name = signal.Signals(end.status - 128).name
        screen.print(f"rank {first} ended by {name}, which the run was sent", is_error=True)
    elif len(watched.ended) > 1:
        lines = [f"rank {first} failed with {failure.status_text(end.status)}:"]
        lines += failure.reason(watched.ended[first].errors)
        screen.print("\n".join(lines), is_error=True)
    elif end.status > 128:
        screen.print(f"the process failed with {failure.status_text(end.status)}", is_error=True)
    return end.status
