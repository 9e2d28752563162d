"""Exposed communication: how much longer a step takes on a slow cable than on a fast one.

Each arm is a pair of processes that stays; rounds alternate between the arms, and in each the cable
is slow and then fast. The difference is what the arithmetic does not hide. Bytes are those that
the hosts' network cards have counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron.engine import start_distributed
from tools.benchmarks import wire
from tools.benchmarks.cable_arms import Arm, Step, prepared

STEPS = 2
ANSWER_S = 120.0


class Row(NamedTuple):
    """Medians over the rounds of an arm.

    Attributes:
        sent: bytes that a rank sends in a step.
        step_s: of the slow cable.
        alone_s: of the fast one.
        rounds: exposed seconds of each round.
    """

    name: str
    sent: float
    step_s: float
    alone_s: float
    rounds: tuple[float, ...]

    @property
    def exposed_s(self) -> float:
        """What the cable adds to a step."""
        return statistics.median(self.rounds)


def measured(
    arms: Mapping[str, Arm], cable: wire.Cable, rounds: int, ranks: int = 2, steps: int = STEPS
) -> list[Row]:
    """A row for each arm, half of its ranks on each of the cable's hosts."""
    with contextlib.ExitStack() as stack:
        cable.shape(False)
        workers = {
            name: stack.enter_context(_workers(cable, arm, ranks, 29500 + number))
            for number, (name, arm) in enumerate(arms.items())
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, pipes in workers.items():
                times = []
                for shaped in (True, False):
                    cable.shape(shaped)
                    answers = _asked(pipes, steps)
                    times.append(max(seconds for seconds, _ in answers))
                    sent = sum(count for _, count in answers) / ranks
                found[name].append((times[0], times[1], sent))
    return [_row(name, results) for name, results in found.items()]


def _row(name: str, results: Sequence[tuple[float, float, float]]) -> Row:
    slow, fast, sent = zip(*results, strict=True)
    return Row(
        name,
        statistics.median(sent),
        statistics.median(slow),
        statistics.median(fast),
        tuple(one - other for one, other in zip(slow, fast, strict=True)),
    )


@contextlib.contextmanager
def _workers(cable: wire.Cable, arm: Arm, ranks: int, port: int) -> Iterator[list[Connection]]:
    """The ranks of an arm, ready."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    try:
        for rank in range(ranks):
            mine, its = context.Pipe()
            process = context.Process(target=_rank, args=(its, cable, arm, rank, ranks, port))
            process.start()
            its.close()
            pipes.append(mine)
            processes.append(process)
        for pipe in pipes:
            _answer(pipe)
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _asked(pipes: Sequence[Connection], steps: int) -> list[tuple[float, int]]:
    for pipe in pipes:
        pipe.send(steps)
    return [_answer(pipe) for pipe in pipes]


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(ANSWER_S):
        raise TimeoutError("a rank does not answer")
    answer = pipe.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _rank(pipe: Connection, cable: wire.Cable, arm: Arm, rank: int, ranks: int, port: int) -> None:
    """Trains a few steps whenever it is asked to."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        first = cable.enter(rank, ranks)
        os.environ["GLOO_SOCKET_IFNAME"] = cable.card
        start_distributed("gloo", rank, ranks, 0, f"tcp://{cable.addresses[0]}:{port}", 60)
        step = prepared(arm, ranks)
        step.run()
        pipe.send(0)
        while True:
            pipe.send(_timed(step, pipe.recv(), first))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(f"rank {rank}: {type(error).__name__}: {error}")


def _timed(step: Step, steps: int, counts: bool) -> tuple[float, float]:
    """Seconds of a step, and bytes that this host has sent in one; one step leads in."""
    _settled(step)
    before = wire.sent()
    step.run()
    began = time.perf_counter()
    for _ in range(steps):
        step.run()
    seconds = (time.perf_counter() - began) / steps
    _settled(step)
    return seconds, (wire.sent() - before) / (steps + 1) if counts else 0


def _settled(step: Step) -> None:
    """Nothing of this arm is on the cable."""
    step.finish()
    dist.barrier()
    time.sleep(0.02)
    dist.barrier()
