"""A training rank without torch: notes who it is, meets the others, waits, fails or stops.

probe.py FOLDER                     write FOLDER/<rank>.json and end
probe.py FOLDER fail RANK HOW       rank RANK ends: HOW is a status, `traceback` or `kill`
probe.py FOLDER stop                wait for a signal, save as a run does, end with 0
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

from megatron.launch.rank_process import begin, run_to_end
from megatron.launch.ranks import Ranks, find_ranks, rendezvous

MEET_S = 20.0
WAIT_S = 60.0
SAVE_S = 2.2  # longer than Open MPI waits between SIGTERM and SIGKILL
KEPT = ("MASTER_", "NCCL_", "GLOO_", "FI_", "DS_", "MEGATRON_", "CCL_", "OMP_")


def main(folder: Path, mode: str = "", *more: str) -> int:
    ranks = find_ranks(os.environ)
    meeting = rendezvous(os.environ)
    signals: list[int] = []
    if mode == "stop":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, lambda number, _: signals.append(number))
    about = {
        "rank": ranks.rank,
        "local_rank": ranks.local_rank,
        "world_size": ranks.world_size,
        "local_world_size": ranks.local_world_size,
        "family": ranks.family,
        "rendezvous": meeting,
        "host": socket.gethostname(),
        "environ": {k: v for k, v in os.environ.items() if k.startswith(KEPT)},
    }
    meet(ranks, meeting)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(about), encoding="utf-8")
    all_there(folder, ranks)
    print(f"rank {ranks.rank} of {ranks.world_size} is there")
    if mode == "fail":
        return fail(ranks, int(more[0]), more[1])
    if mode == "stop":
        return stop(folder, ranks, signals)
    return 0


def meet(ranks: Ranks, meeting: str) -> None:
    """All ranks reach the address of the run, where rank 0 listens, or torchrun does."""
    host, port = meeting.removeprefix("tcp://").rsplit(":", 1)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0 and not agent:
            server = stack.enter_context(socket.create_server(("", int(port)), backlog=99))
            server.settimeout(MEET_S)
            for _ in range(1, ranks.world_size):
                server.accept()[0].close()
            return
        until = time.monotonic() + MEET_S
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection((host, int(port)), timeout=MEET_S).close()
                return
            assert time.monotonic() < until, f"nobody listens at {meeting}"
            time.sleep(0.05)


def all_there(folder: Path, ranks: Ranks) -> None:
    """Wait until every rank has written who it is."""
    until = time.monotonic() + MEET_S
    while not all((folder / f"{rank}.json").exists() for rank in range(ranks.world_size)):
        assert time.monotonic() < until, "ranks are missing"
        time.sleep(0.02)


def fail(ranks: Ranks, failing: int, how: str) -> int:
    """One rank ends; the others wait for it, as in a collective."""
    if ranks.rank != failing:
        time.sleep(WAIT_S)
        return 0
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "traceback":
        raise RuntimeError(f"what rank {failing} did wrong")
    print(f"[rank {failing}] error: what rank {failing} found wrong", file=sys.stderr)
    return int(how)


def stop(folder: Path, ranks: Ranks, signals: list[int]) -> int:
    """Save once a signal has come."""
    until = time.monotonic() + WAIT_S
    while not signals and time.monotonic() < until:
        time.sleep(0.05)
    until = time.monotonic() + SAVE_S
    while time.monotonic() < until:
        time.sleep(0.05)
    (folder / f"saved-{ranks.rank}").write_text(str(signals[0]), encoding="ascii")
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # as in training: lines arrive whole
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True, write_through=False)
    begin([], os.environ)
    sys.exit(run_to_end(partial(main, Path(sys.argv[1]), *sys.argv[2:]), os.environ))
