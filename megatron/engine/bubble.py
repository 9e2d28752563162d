"""The measured pipeline bubble: the fraction of the steps' time in which a stage computes nothing.

Forward and backward passes are timed on each stage; a wait for a neighbour is in neither. On an
accelerator the times are events on its stream, read once they have happened, so that no micro-batch
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron.engine.clock import moment
from megatron.parallel.groups import Axis


@dataclass
class _Step:
    """Events of one step of one stage."""

    start: Any
    passes: list[tuple[Any, Any]] = field(default_factory=list)

    def times(self) -> tuple[float, float]:
        """Milliseconds in passes, and from the start to the end of the last pass."""
        busy = sum(before.elapsed_time(after) for before, after in self.passes)
        return busy, self.start.elapsed_time(self.passes[-1][1])


class StageClock(AbstractContextManager["StageClock"]):
    """Times the passes of this rank's stage; a training step is taken inside `with clock:`.

    Args:
        device: of the stage.
        pp: pipeline axis, of two stages or more.
    """

    def __init__(self, device: torch.device, pp: Axis) -> None:
        self._device = device
        self._pp = pp
        self._current: _Step | None = None
        self._waiting: list[_Step] = []  # their events may not have happened yet
        self._busy = self._window = 0.0  # milliseconds

    def __enter__(self) -> StageClock:
        while self._waiting and self._waiting[0].passes[-1][1].query():
            self._add(self._waiting.pop(0))
        self._current = _Step(moment(self._device))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._current is not None
        if self._current.passes:
            self._waiting.append(self._current)
        self._current = None  # passes of an evaluation are not counted

    def timed(self, run: Callable[..., None]) -> Callable[..., None]:
        """`run`, a forward or backward pass, with its times recorded here."""

        def wrapped(*args: Any, **kwargs: Any) -> None:
            if self._current is None:
                run(*args, **kwargs)
                return
            before = moment(self._device)
            run(*args, **kwargs)
            self._current.passes.append((before, moment(self._device)))

        return wrapped

    def bubble(self) -> float | None:
        """The bubble of the steps since the last call; a collective over the stages.

        Returns:
            1 - (mean time in passes) / (longest time from the start of a step to a stage's last
            pass); None where there was no step.
        """
        if self._waiting:
            self._waiting[-1].passes[-1][1].synchronize()
        for step in self._waiting:
            self._add(step)
        self._waiting.clear()
        mine = torch.tensor([self._busy, self._window], device=self._device)
        self._busy = self._window = 0.0
        stages = [torch.empty_like(mine) for _ in range(self._pp.size)]
        dist.all_gather(stages, mine, group=self._pp.group)
        busy, window = zip(*torch.stack(stages).tolist(), strict=True)
        return 1 - sum(busy) / len(busy) / max(window) if max(window) > 0 else None

    def _add(self, step: _Step) -> None:
        busy, window = step.times()
        self._busy += busy
        self._window += window
