"""Forks ranks from one process that has imported torch, deepspeed and the program.

    python -m tests.faults.fork_server SOCKET

`client.py` stands in for the interpreter: it hands its arguments, environment and open files to
this server, and lives and dies with the rank that is forked. The server itself starts no thread.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.warm_process import _die_with_parent, _preload

POLL_S = 0.005
MOST_FILES = 64
LENGTH = 8  # bytes of a message's length, which its open files travel with


@dataclass
class Rank:
    """A forked rank and the connection of the client that stands for it."""

    pid: int
    client: socket.socket


def main(path: str) -> None:
    """Serves until the process that started this one is gone."""
    _die_with_parent()
    _preload()
    importlib.import_module("pretrain_gpt_alcf")
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads - 1} threads were started by imports: a fork is not safe"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)  # whoever sees it can connect
    ranks: list[Rank] = []
    while True:
        ready = select.select([listener, *(rank.client for rank in ranks)], [], [], POLL_S)[0]
        if listener in ready:
            client, _ = listener.accept()
            with contextlib.suppress(OSError, EOFError):  # a client that was killed meanwhile
                ranks.append(_forked(client, listener))
        for rank in ranks:
            if rank.client in ready:  # it sends nothing more: it is gone, as a killed process is
                _kill(rank.pid)
        for rank in list(ranks):
            done, status = os.waitpid(rank.pid, os.WNOHANG)
            if done:
                _kill(rank.pid)  # what it left in its session
                with contextlib.suppress(OSError):
                    rank.client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                rank.client.close()
                ranks.remove(rank)


def _forked(client: socket.socket, listener: socket.socket) -> Rank:
    fds, request = _received(client)
    try:
        pid = os.fork()
        if pid == 0:
            listener.close()
            _live(request, fds)
    finally:
        for fd in fds:
            os.close(fd)
    client.sendall(f"{pid}\n".encode())
    return Rank(pid, client)


def _received(client: socket.socket) -> tuple[list[int], dict]:
    """Open files and request of a client."""
    numbers = array.array("i")
    space = socket.CMSG_SPACE(MOST_FILES * numbers.itemsize)
    head, ancillary, _, _ = client.recvmsg(LENGTH, space)
    for _, _, data in ancillary:
        numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    if not head:
        raise EOFError
    length, text = int(head), b""
    while len(text) < length:
        part = client.recv(length - len(text))
        if not part:
            raise EOFError
        text += part
    return list(numbers), json.loads(text)


def _live(request: dict, fds: list[int]) -> NoReturn:
    """A rank's whole life, as an interpreter of its own would lead it."""
    status = 1
    try:
        os.setsid()
        _die_with_parent()
        _take_files(dict(zip(request["fds"], fds, strict=True)))
        # The server's own were made for other files: a pipe cannot be sought in.
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        os.environ.clear()
        os.environ.update(request["environ"])
        os.chdir(request["cwd"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _note_pid()
        _hook()
        status = _run(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        os._exit(status)


def _take_files(wanted: dict[int, int]) -> None:
    """Each file under the number that it had in the client."""
    above = max([*wanted, *wanted.values()]) + 1
    moved = {}
    for number, fd in wanted.items():
        moved[number] = above
        os.dup2(fd, above)
        above += 1
    for number, fd in moved.items():
        os.dup2(fd, number)
        os.close(fd)


def _note_pid() -> None:
    folder = os.environ.get("FAULTS_PIDS")
    if folder:
        path = Path(folder) / f"rank-{os.environ['RANK']}.pid"
        path.with_suffix(".new").write_text(str(os.getpid()))
        path.with_suffix(".new").replace(path)


def _hook() -> None:
    """What a case does to a rank: FAULTS_HOOK names functions `module:function`, with commas."""
    for name in filter(None, os.environ.get("FAULTS_HOOK", "").split(",")):
        module, function = name.split(":")
        getattr(importlib.import_module(module), function)()


def _run(argv: list[str]) -> int:
    """Runs a script as `python script ...` does; returns its exit status."""
    import torch

    torch.set_num_threads(1)
    sys.argv = argv
    status = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # threads are waited for, as at the end of any interpreter
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
