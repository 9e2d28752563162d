"""Pipeline schedules, played: when each stage computes which micro-batch."""

from __future__ import annotations

from typing import NamedTuple

FORWARD, BACKWARD = 1, 2
"""Units of time of a micro-batch's two passes through a stage."""


class Work(NamedTuple):
    """One pass of a micro-batch through a stage."""

    stage: int
    micro_batch: int
    backward: bool
    start: int

    @property
    def end(self) -> int:
        """When it is done."""
        return self.start + (BACKWARD if self.backward else FORWARD)


def gpipe(stage: int, stages: int, micro_batches: int) -> list[tuple[int, bool]]:
    """All forward passes, then all backward passes: (micro-batch, whether backward)."""
    order = range(micro_batches)
    return [*((n, False) for n in order), *((n, True) for n in order)]


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> list[tuple[int, bool]]:
    """As many forward passes as stages are behind, then one backward, one forward."""
    ahead = min(stages - 1 - stage, micro_batches)
    order = [(n, False) for n in range(ahead)]
    for n in range(micro_batches):
        if ahead + n < micro_batches:
            order.append((ahead + n, False))
        order.append((n, True))
    return order


ORDERS = {"GPipe": gpipe, "1F1B": one_f_one_b}


def play(name: str, stages: int, micro_batches: int) -> list[Work]:
    """Each pass starts as soon as its stage is free and what it needs has arrived."""
    waiting = {stage: ORDERS[name](stage, stages, micro_batches) for stage in range(stages)}
    done: dict[tuple[int, int, bool], Work] = {}
    free = [0] * stages
    while any(waiting.values()):
        for stage, left in waiting.items():
            if not left:
                continue
            number, backward = left[0]
            needs = [(stage, number, False)] if backward else []
            before = stage + 1 if backward else stage - 1
            needs += [(before, number, backward)] if 0 <= before < stages else []
            if all(need in done for need in needs):
                start = max([free[stage], *(done[need].end for need in needs)])
                work = done[stage, number, backward] = Work(stage, number, backward, start)
                free[stage] = work.end
                left.pop(0)
    return list(done.values())


def bubble(works: list[Work], stages: int) -> float:
    """The part of the stages' time in which they wait."""
    end = max(work.end for work in works)
    return 1 - sum(work.end - work.start for work in works) / (stages * end)


def in_flight(works: list[Work], stage: int) -> int:
    """Most micro-batches whose activations a stage holds at once."""
    own = [work for work in works if work.stage == stage]
    return max(
        sum(other.start <= work.start for other in own if not other.backward)
        - sum(other.end <= work.start for other in own if other.backward)
        for work in own
    )
