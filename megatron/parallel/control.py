"""Small messages between all ranks over the CPU: flags that all agree on, names, counts.

They never touch the accelerator. The ranks form a grid, and each belongs to the gloo groups of its
row and of its column only: connections and hops per rank grow with the root of the world.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron.parallel.groups import new_group

T = TypeVar("T")

ONE_ROW = 8  # ranks; measured up to here, 0.4 to 0.6 of the time of two hops


class Control:
    """All ranks of a run, as `make_control` gives it; `ALONE` is a process without a group.

    Every method but `rank` and `size` is a collective: all ranks call the same ones in the same
    order, from one thread.

    Args:
        rank, size: of this process in the world.
        row, column: groups of this rank's row and column; None where one rank is all of it.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        row: dist.ProcessGroup | None = None,
        column: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self._row, self._column = row, column

    def maximum(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks, on all ranks."""
        most: list[int] = self._reduced(torch.tensor(values), dist.ReduceOp.MAX).tolist()
        return most

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks, on all ranks: the same bits on every one."""
        numbers = torch.tensor(values, dtype=torch.float64)
        total: list[float] = self._reduced(numbers, dist.ReduceOp.SUM).tolist()
        return total

    def gather(self, value: T) -> list[T] | None:
        """Every rank's value in rank order, on rank 0; None elsewhere. Keep values small."""
        values = [value]
        for group in (self._row, self._column):
            if group is None:
                continue
            leads = dist.get_rank(group) == 0
            own: list[Any] | None = [None] * dist.get_world_size(group) if leads else None
            dist.gather_object(values, own, group=group, group_dst=0)
            if own is None:
                return None
            values = [one for part in own for one in part]
        return values

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank; the others pass None."""
        data = pickle.dumps(value) if self.rank == 0 else b""
        length = torch.tensor([len(data)])
        for group in (self._column, self._row):
            if group is not None:
                dist.broadcast(length, group=group, group_src=0)
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None
        if content is None:
            content = torch.empty(int(length), dtype=torch.uint8)
        for group in (self._column, self._row):
            if group is not None:
                dist.broadcast(content, group=group, group_src=0)
        received: T = value if self.rank == 0 else pickle.loads(content.numpy().tobytes())  # type: ignore[assignment]
        return received

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value in rank order, on every rank."""
        return self.broadcast(self.gather(value))

    def barrier(self) -> None:
        """Returns once all ranks have called it."""
        self.maximum([0])

    def first(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, on every rank; an OSError there is raised on all."""
        result: tuple[T | None, OSError | None] = (None, None)
        if self.rank == 0:
            try:
                result = (action(), None)
            except OSError as error:
                result = (None, error)
        value, failed = self.broadcast(result)
        if failed is not None:
            raise failed
        return value  # type: ignore[return-value]

    def _reduced(self, values: torch.Tensor, op: Any) -> torch.Tensor:
        for group in (self._row, self._column):
            if group is not None:
                dist.all_reduce(values, op=op, group=group)
        return values


ALONE = Control()


def make_control() -> Control:
    """The ranks of the world; a collective, after torch.distributed is initialised.

    Call it before the engine is built: torch names a group by its members and by how many groups a
    rank is in, which differs after that (tied weights of a pipeline), and a group would wait for
    ever.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    width = row_length(world)
    first = rank // width * width

    def group(ranks: Sequence[int]) -> dist.ProcessGroup | None:
        return new_group(ranks, "gloo") if len(ranks) > 1 else None

    row = group(range(first, first + width))
    return Control(rank, world, row, group(range(rank % width, world, width)))


def row_length(world: int) -> int:
    """Ranks in a row of the grid: the divisor of `world` next to its root, from above.

    Few ranks are one row: a second hop takes longer than a longer ring.
    """
    if world <= ONE_ROW:
        return world
    return next(width for width in range(isqrt(world - 1) + 1, world + 1) if world % width == 0)
