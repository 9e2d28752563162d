"""The process tests/spawn.py forks ranks from: requests in and replies out, on pipes.

It imports torch, deepspeed and the tests' modules, and runs none of their code itself: a fork is
safe only while there are no threads, and autograd or a process group would start some.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import pickle
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

POLL_S = 0.005
TAIL_CHARACTERS = 4000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Request:
    """A case: a pickled (function, arguments) of `module`, and the world it needs."""

    module: str
    call: bytes
    world_size: int
    timeout: float
    environ: dict[str, str]
    path: list[str]
    cwd: str


@dataclass
class Reply:
    """Pickled results in rank order, or the failure of a rank (None: of no rank in particular)."""

    results: list[bytes] = field(default_factory=list)
    failure: str | None = None
    rank: int | None = None


def write_message(stream: Any, message: Any) -> None:
    """Writes one length-prefixed pickle."""
    data = pickle.dumps(message)
    view = memoryview(struct.pack("<Q", len(data)) + data)
    while view:
        view = view[stream.write(view) :]
    stream.flush()


def read_message(stream: Any) -> Any:
    """Reads what write_message wrote.

    Raises:
        EOFError: the other end is closed.
    """
    (length,) = struct.unpack("<Q", _read(stream, 8))
    return pickle.loads(_read(stream, length))


def _read(stream: Any, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = stream.read(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def main() -> None:
    """Answers requests until the pipe closes; what anything prints goes to stderr."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    _die_with_parent()
    _preload()
    while True:
        try:
            request = read_message(requests)
        except EOFError:
            return
        write_message(replies, _answer(request, requests))


def _preload() -> None:
    import torch

    # What torch imports only at the first backward or collective: seconds, in every rank of every
    # case.
    import torch._dynamo
    import torch._functorch.autograd_function
    import torch.distributed
    import torch.distributed._functional_collectives
    import torch.fx.experimental.symbolic_shapes
    import torch.utils.checkpoint

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        import deepspeed
    # Else every first init_distributed compiles a C++ extension, for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _answer(request: Request, requests: BinaryIO) -> Reply:
    sys.path[:] = request.path
    try:
        importlib.import_module(request.module)
    except Exception:
        return Reply(failure=f"cannot import {request.module}:\n{traceback.format_exc()}")
    threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
    if threads > 1:
        return Reply(
            failure=f"importing {request.module} started {threads - 1} threads: a fork is not safe"
        )
    with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as folder:
        pids: dict[int, int] = {}
        try:
            for rank in range(request.world_size):
                pids[rank] = _fork(request, rank, Path(folder))
            return _wait(request, pids, Path(folder), requests)
        finally:
            for pid in pids.values():
                _kill(pid)


def _wait(request: Request, pids: dict[int, int], folder: Path, requests: BinaryIO) -> Reply:
    """Waits for all ranks or the first failure; ended ranks leave `pids`."""
    deadline = time.monotonic() + request.timeout
    while pids:
        ended = dict(_ended(pids))
        for rank in ended:
            # Not before it is reaped: what a rank started (data loaders, compilers) ends with it.
            _kill_group(pids.pop(rank))
        failed = [rank for rank, status in ended.items() if status != 0]
        if failed:
            # One that failed before, and that the others noticed, may not have ended yet.
            for rank in [rank for rank in pids if (folder / f"{rank}.time").exists()]:
                ended[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
                _kill_group(pids.pop(rank))
                failed.append(rank)
            rank = min(failed, key=lambda rank: _failed_at(folder, rank))
            return Reply(failure=_failure(request, folder, rank, ended[rank]), rank=rank)
        if time.monotonic() > deadline:
            return Reply(failure=_too_long(request, pids, folder))
        if not ended and select.select([requests], [], [], POLL_S)[0]:
            os._exit(1)  # the tests' process is gone; the ranks die with this one
    return Reply([(folder / f"{rank}.result").read_bytes() for rank in range(request.world_size)])


def _ended(pids: dict[int, int]) -> Iterator[tuple[int, int]]:
    for rank, pid in pids.items():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            yield rank, os.waitstatus_to_exitcode(status)


def _failed_at(folder: Path, rank: int) -> float:
    """When a rank failed; one that died without a word did so before any that has noticed."""
    path = folder / f"{rank}.time"
    return float(path.read_text()) if path.exists() else 0.0


def _failure(request: Request, folder: Path, rank: int, status: int) -> str:
    path = folder / f"{rank}.error"
    if path.exists():
        what = path.read_text()
    elif status < 0:
        what = f"died of signal {-status} ({signal.Signals(-status).name})\n"
    else:
        what = f"exited with status {status}\n"
    return f"rank {rank} of {request.world_size}: {what}{_printed(folder, rank)}"


def _too_long(request: Request, pids: dict[int, int], folder: Path) -> str:
    for pid in pids.values():
        os.kill(pid, signal.SIGUSR1)  # faulthandler writes where the rank stands
    time.sleep(0.3)
    stacks = "".join(
        f"rank {rank} of {request.world_size}:\n{_printed(folder, rank)}" for rank in pids
    )
    return f"no end after {request.timeout} s; still running: ranks {[*pids]}\n{stacks}"


def _printed(folder: Path, rank: int) -> str:
    text = (folder / f"{rank}.log").read_text(errors="replace")[-TAIL_CHARACTERS:]
    return f"--- printed by rank {rank}:\n{text}" if text else ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    _kill_group(pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _fork(request: Request, rank: int, folder: Path) -> int:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _rank(request, rank, folder, log)
    os.close(log)
    return pid


def _rank(request: Request, rank: int, folder: Path, log: int) -> NoReturn:
    """A rank's whole life; ends by os._exit, for the exit handlers are not its own."""
    status = 1
    try:
        os.setsid()
        _die_with_parent()
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        result = _call(request, rank, folder)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        (folder / f"{rank}.time").write_text(f"{time.monotonic()}")
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _call(request: Request, rank: int, folder: Path) -> Any:
    import torch
    import torch.distributed as dist

    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(request.world_size),
            "LOCAL_WORLD_SIZE": str(request.world_size),
            **request.environ,
        }
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name lookups, no network
    os.chdir(request.cwd)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), request.world_size),
        rank=rank,
        world_size=request.world_size,
        timeout=timedelta(seconds=request.timeout),
    )
    fn, args = pickle.loads(request.call)
    result = fn(*args)
    if dist.is_initialized():
        # A rank that leaves early closes connections others may still read from.
        dist.barrier()
    return result


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    # Not __main__'s own main: the requests are pickled under this module's name.
    from tests import warm_process

    warm_process.main()
