"""Rounds: an arm is a process that stays alive, compiles once, and trains some steps when told.

A machine's speed drifts, so arms take turns: a round of one, a round of the next, and so on. While
one works the others wait on a pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.benchmarks.workload import Workload

if TYPE_CHECKING:
    from megatron.training.device import Device

Train = Callable[["Rounds", Workload], None]

LIMIT_S = 300.0
"""Of one round, with all imports and compilation in the first."""


class Rounds:
    """The arm's side: `done` after every step; the rest of the loop is the arm's own.

    Args:
        pipe: to the process that leads.
        device: waited for before the clock is read.
    """

    def __init__(self, pipe: Connection, device: Device) -> None:
        self.device = device
        self.asked = False  # and has not answered yet
        self._pipe = pipe
        self._losses: list[Any] = []
        self._left = 0
        self._began = 0.0

    def wait(self) -> bool:
        """Waits for a round; False: there is none any more."""
        self._left = self._pipe.recv()
        self.asked = True
        if self._losses and self.device.kind == "cpu":
            _forget_peak()
        self._losses = []
        self.device.synchronize()
        self._began = time.perf_counter()
        return self._left > 0

    def done(self, loss: Any) -> bool:
        """A step is done; True: another one is wanted.

        Args:
            loss: of the step, a scalar or a tensor, which is read after the clock.
        """
        self._losses.append(loss)
        self._left -= 1
        if self._left:
            return True
        self.device.synchronize()
        seconds = time.perf_counter() - self._began
        self.reply(
            {
                "seconds": seconds / len(self._losses),
                "losses": [float(value) for value in self._losses],
                "peak_gib": self.device.memory_max_gib(),
            }
        )
        return self.wait()

    def reply(self, answer: dict[str, Any]) -> None:
        """Sends what a round found."""
        self.asked = False
        self._pipe.send(answer)


class Arm:
    """The leader's side: a process that runs `train` on a workload.

    Args:
        name: of the arm.
        train: a function of a module; it calls `Rounds.wait` once, and `done` after every step.
        work: handed to it.
        log: file for what the process prints.
        environment: variables of the process, where they are not set.
    """

    def __init__(
        self,
        name: str,
        train: Train,
        work: Workload,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._log = name, log
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, train, work, log), daemon=True)
        variables = {**(environment or {}), **os.environ}
        if work.threads:
            variables["OMP_NUM_THREADS"] = str(work.threads)
        with _environment(variables):
            self._process.start()
        theirs.close()

    def round(self, steps: int) -> dict[str, Any]:
        """Trains some steps: seconds per step, losses, peak_gib; or error, where it failed."""
        try:
            self._pipe.send(steps)
            if not self._pipe.poll(LIMIT_S):
                self._process.kill()
                return {"error": f"no answer within {LIMIT_S:.0f} s, see {self._log}"}
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            answer = {"error": f"ended with status {self._process.exitcode}, see {self._log}"}
        return answer

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(0)
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What a new process inherits: the C library and OpenMP read it as they are loaded."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _forget_peak() -> None:
    """Resident memory's peak begins anew: the warm-up's, with a compiler in it, is not a step's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _serve(pipe: Connection, train: Train, work: Workload, log: Path) -> None:
    """The process of an arm."""
    with log.open("wb") as out:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(out.fileno(), stream.fileno())
    rounds: Rounds | None = None
    try:
        from megatron.training.device import detect, prepare

        run = work.run()
        device = detect(0, run.train.dtype, run.launch.device)
        prepare(device, run.train.dtype)
        rounds = Rounds(pipe, device)
        train(rounds, work)
    except EOFError:  # whoever leads is gone
        pass
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError, EOFError):
            if rounds is None or not rounds.asked:
                pipe.recv()
            pipe.send(
                {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
            )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking an engine apart may take longer than a round
