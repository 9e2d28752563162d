"""Runs a function on several ranks, each a process, and returns what each of them returned.

    def worker(rank_offset: int) -> int: ...           # a function of a module, not a lambda
    assert run(worker, 2, 5) == [5, 6]

The ranks are forked from a warm process that has imported torch and deepspeed and nothing that
starts threads, so a case costs what it computes and not the imports. They talk over gloo through a
file: no ports.
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.warm_process import Request, read_message, write_message

KILL_AFTER_S = 20.0
"""The warm process ends a case that is too long; this much later it is itself taken to hang."""


class RankError(RuntimeError):
    """A rank failed: its number, its traceback and the end of what it printed.

    Attributes:
        rank: the first rank that failed; None where all were stopped for taking too long.
    """

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


def run(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    environ: Mapping[str, str] | None = None,
) -> list[Any]:
    """Calls fn(*args) on every rank of a gloo world.

    In a rank torch.distributed is initialised (torch.distributed.get_rank() is the rank), RANK,
    LOCAL_RANK and WORLD_SIZE are set, torch has one thread, denormals are zero and no accelerator
    is seen. What a test has patched in its own process is not patched there.

    Args:
        fn: function at the top of an importable module.
        world_size: ranks.
        args: picklable arguments, the same for all ranks.
        timeout: seconds for the whole case.
        environ: more environment variables for the ranks.

    Returns:
        fn's results in rank order (picklable).

    Raises:
        RankError: a rank raised, died, or the case took longer than `timeout`; no rank is left
            running.
    """
    try:
        call = pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{fn!r} and its arguments must be picklable: fn a function of a module"
        ) from error
    request = Request(
        module=fn.__module__,
        call=call,
        world_size=world_size,
        timeout=timeout,
        environ=dict(environ or {}),
        path=[*sys.path],
        cwd=os.getcwd(),
    )
    reply = _WARM.ask(request)
    if reply.failure is not None:
        raise RankError(reply.failure, reply.rank)
    return [pickle.loads(result) for result in reply.results]


class _WarmProcess:
    """Started by the first case, again if it died, ended with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Request) -> Any:
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                write_message(process.stdin, request)
                # Imports of the first case are in this time as well.
                limit = request.timeout + KILL_AFTER_S + 60
                if not select.select([process.stdout], [], [], limit)[0]:
                    raise RankError(f"the warm process gave no answer in {limit:.0f} s", None)
                return read_message(process.stdout)
            except (BrokenPipeError, EOFError) as error:
                raise RankError(f"the warm process ended: status {process.wait()}", None) from error
            except BaseException:
                # Interrupted half way, the pipe holds half a message: the next case needs a new
                # process.
                self.stop()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            root = Path(__file__).resolve().parent.parent
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=root,
                env=_environment(root),
                bufsize=0,
                # An interrupt from the keyboard is for this process to handle.
                start_new_session=True,
            )
        return self._process

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()  # its ranks die with it
        self._process.wait()
        self._process = None


def _environment(root: Path) -> dict[str, str]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **os.environ,
        **one_thread,
        "TORCHDYNAMO_DISABLE": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(
            [str(root), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        ),
    }


_WARM = _WarmProcess()
atexit.register(_WARM.stop)
