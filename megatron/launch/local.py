"""Starts the ranks and follows them to their end: what they print, and why the first one failed."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron.launch import failure, process
from megatron.launch.command import SIGNALS
from megatron.launch.hang import named
from megatron.launch.hang_watch import STOPS, HangWatch, host_name, reachable_name
from megatron.launch.heartbeat import HEARTBEAT
from megatron.launch.launch_plan import LOCAL, LaunchPlan
from megatron.launch.ranks import EXPECTED, free_port
from megatron.launch.screen import Screen

HUNG_GRACE_S = 2.0  # a stopped process hears no SIGTERM, and one in a collective only notes it


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


@dataclass(frozen=True)
class Attempt:
    """How a start ended.

    Attributes:
        status: 0 where all ended with 0; the status of the launcher, or of the rank that failed
            first, whose error is then the last thing on the screen; 124 where they hung; 128 + n
            where they hung after signal n was passed on.
        signals: that came meanwhile and were passed on.
        reason: of a failure, in a few words.
        ranks: that failed first or hang, as far as they are known.
        hosts: of the ranks that failed first or hang, as far as they are known.
    """

    status: int
    signals: tuple[int, ...] = ()
    reason: str = ""
    ranks: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()


def execute(planned: LaunchPlan, screen: Screen, idle_timeout_s: float | None = None) -> int:
    """Start what was planned, and wait until the last process has ended; heartbeats are not heard.

    Returns:
        The status, as in `Attempt`; 124 where nothing was printed for `idle_timeout_s` seconds.
    """
    watched = process.watch(_children(planned), screen.line, idle_timeout_s=idle_timeout_s)
    if watched.hung:
        started = "ranks" if planned.launcher == LOCAL else planned.launcher
        screen.print(f"no output for {idle_timeout_s:g} s: {started} stopped", is_error=True)
        return process.HUNG
    return print_failure(watched, screen, planned).status


def attempt(
    planned: LaunchPlan,
    screen: Screen,
    stacks: Path,
    hang_timeout_s: float | None = None,
    early: Sequence[int] = (),
) -> Attempt:
    """Start what was planned, and wait until the last process has ended or all of them hang.

    Args:
        planned: the start.
        screen: takes what they print.
        stacks: folder for the stacks of a hang.
        hang_timeout_s: seconds without progress that are a hang; None: learnt; 0: never.
        early: signals that came before: the ranks get them as they start, SIGUSR1 once they listen.
    """
    own = planned.launcher == LOCAL
    master = planned.environ.get("MASTER_ADDR", "")
    host = "127.0.0.1" if own else reachable_name(planned.hosts, master, socket.gethostname())
    tell = partial(screen.print, is_error=True)
    with closing(HangWatch(host, planned.ranks, stacks, hang_timeout_s, tell, own=own)) as hangs:
        environ = {HEARTBEAT: hangs.address}
        grace_s = HUNG_GRACE_S if own else process.GRACE_S

        def poll(signals: Sequence[int], failing: bool) -> bool:
            first = hangs.table.ranks.get(0)
            screen.turn(first.beat if first else None)
            return hangs.poll(signals, failing)

        watched = process.watch(
            _children(planned, environ),
            screen.line,
            hangs=poll,
            hung_grace_s=grace_s,
            notices=process.Notices(hangs.all_began, early),
            early=early,
        )
        if not watched.hung:
            ended = print_failure(watched, screen, planned)
            return replace(ended, hosts=_hosts(planned, hangs, ended.ranks))
        return _hung(planned, hangs, watched, screen)


def _hung(
    planned: LaunchPlan, hangs: HangWatch, watched: process.Watched, screen: Screen
) -> Attempt:
    """Say how a hang was ended, and which ranks to look at."""
    number = next((number for number in watched.signals if number in STOPS), None)
    status = process.HUNG if number is None else 128 + number
    ranks = tuple(hangs.suspects)
    reason = f"{hangs.verdict}; look at {named(ranks)} first" if ranks else hangs.verdict
    screen.print(f"the run hung and was killed, status {status}: {reason}", is_error=True)
    hosts = _hosts(planned, hangs, ranks)
    if 2 * len(hosts) > len(planned.hosts):  # that many are not broken: something else is
        hosts = ()
    return Attempt(status, tuple(watched.signals), f"it hung: {reason}", ranks, hosts)


def _terminal() -> dict[str, str]:
    """The width of this terminal, for what the ranks draw; nothing where it is none."""
    try:
        return {"COLUMNS": str(os.get_terminal_size(sys.stdout.fileno()).columns)}
    except (OSError, ValueError):  # a pipe, a file, or closed
        return {}


def _children(planned: LaunchPlan, more: Mapping[str, str] | None = None) -> list[process.Child]:
    """The processes to start, with `more` variables: one per rank, or the launcher."""
    environ = {**planned.environ, **_terminal(), **(more or {})}
    if planned.launcher != LOCAL:
        name = planned.launcher if planned.launcher in SIGNALS else planned.dialect
        return [process.Child(planned.command, environ, SIGNALS.get(name or "", {}))]
    ranks, port, cores = planned.ranks, free_port(), usable_cores()
    return [
        process.Child(
            planned.command,
            rank_environment(environ, rank, ranks, port, cores),
            holds_ctrl_c=more is not None,
        )
        for rank in range(ranks)
    ]


def _hosts(planned: LaunchPlan, hangs: HangWatch, ranks: Sequence[int]) -> tuple[str, ...]:
    """The hosts of `ranks`, as the job names them: as their beats say, else as they were planned.

    A launcher may number the hosts in another order than the job.
    """
    found = []
    for rank in ranks:
        said = hangs.host_of(rank)
        named = [host for host in planned.hosts if said and host_name(host) == host_name(said)]
        index = rank // planned.ranks_per_host
        found += named or ([planned.hosts[index]] if index < len(planned.hosts) else [])
    return tuple(dict.fromkeys(found))


def _ask_the_ranks(watched: process.Watched, screen: Screen, planned: LaunchPlan) -> None:
    """Put the ranks' own status in the place of the launcher's."""
    end = watched.ended[0]
    launchers, end.status = end.status, end.first.status(end.status, planned.ranks)
    if launchers and not end.status:
        text = failure.status_text(launchers)
        screen.print(f"all ranks ended as they should; {planned.launcher} says {text}")


def print_failure(watched: process.Watched, screen: Screen, planned: LaunchPlan) -> Attempt:
    """Print why the first rank failed, unless it alone printed it just now."""
    signals = tuple(watched.signals)
    if planned.launcher != LOCAL:
        _ask_the_ranks(watched, screen, planned)
    first = failure.first_failure(watched.ended)
    if first is None:
        return Attempt(0, signals)
    end = watched.ended[first]
    said = end.first
    if end.stopped:  # we were quicker than its own end
        end = min((other for other in watched.ended if other.status), key=lambda other: other.at)
    text, rank = failure.status_text(end.status), first if planned.launcher == LOCAL else said.rank
    reason = f"rank {rank} failed with {text}" if rank is not None else f"it failed with {text}"
    ranks = () if rank is None else (rank,)
    third = end.status > 128 and watched.signals.count(signal.SIGINT) > 2
    if third or end.status - 128 in watched.signals:
        name = signal.Signals(end.status - 128).name
        who = f"rank {first}" if planned.launcher == LOCAL else planned.launcher
        reason = f"{who} ended by {name}, which the run was sent"
        screen.print(reason, is_error=True)
    elif len(watched.ended) > 1:
        lines = failure.reason(watched.ended[first].errors)
        screen.print("\n".join([f"{reason}:", *lines]), is_error=True)
    elif planned.ranks > 1 and said.lines:  # behind a launcher, among the lines of the others
        screen.print("\n".join([f"{reason}:", *said.lines]), is_error=True)
    elif end.status > 128:
        screen.print(f"the process failed with {text}", is_error=True)
    return Attempt(end.status, signals, reason, ranks)
