"""Seconds of the phases of an engine's steps, for runs that ask for them.

The engine's own calls are wrapped from here: a run that does not ask pays nothing. On an
accelerator the moments are events of its stream, so no phase waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from deepspeed.runtime.pipe import schedule

from megatron.engine.clock import HostEvent, moment
from megatron.engine.interface import Engine
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.sharded import ShardedEngine
from megatron.engine.zero import ZeroEngine

BOTH, FORWARD, BACKWARD = "forward-backward", "forward", "backward"
REDUCTION, DATA, OPTIMIZER = "gradient-reduction", "data", "optimizer"
PHASES = (BOTH, FORWARD, BACKWARD, REDUCTION, DATA, OPTIMIZER)
"""forward-backward is a step without its optimizer's part: the waits of a pipeline are in it.
gradient-reduction is what the backward pass did not hide; data is the host's wait for tokens."""

INSTRUCTIONS = {
    schedule.ForwardPass: FORWARD,
    schedule.BackwardPass: BACKWARD,
    schedule.ReduceGrads: REDUCTION,
    schedule.OptimizerStep: OPTIMIZER,
}


@dataclass
class _Step:
    """Moments of one step: (phase, before, after)."""

    start: Any
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    end: Any = None


class Phases:
    """Times each training step of an engine from its making on.

    Args:
        engine: whose calls are wrapped.
    """

    def __init__(self, engine: Engine) -> None:
        self._device, self._sends = engine.device, engine.groups.dp_sp.size > 1
        self._current: _Step | None = None
        self._waiting: list[_Step] = []  # their moments may not have come yet
        self._sums: defaultdict[str, float] = defaultdict(float)  # milliseconds
        self._count = 0  # steps in the sums
        _wrap(engine, "train_batch", self._stepping)
        _wrap(engine, "_to_device", self._iterating)
        if isinstance(engine, PipelineEngine):
            table = engine._deepspeed._INSTRUCTION_MAP
            timed = {kind: self._timed(name, table[kind]) for kind, name in INSTRUCTIONS.items()}
            engine._deepspeed._INSTRUCTION_MAP = {**table, **timed}
        elif isinstance(engine, ZeroEngine):
            _wrap(engine, "_call", partial(self._timed, FORWARD))
            _wrap(engine._deepspeed, "backward", partial(self._timed, BACKWARD))
            _wrap(engine._deepspeed, "step", partial(self._timed, OPTIMIZER))
        elif isinstance(engine, ShardedEngine):
            _wrap(engine, "_call", partial(self._timed, FORWARD))
            _wrap(engine._reduction, "begin", self._begins_backward)
            _wrap(engine._reduction, "end", self._ends_backward)
            _wrap(engine, "_update", partial(self._timed, OPTIMIZER))

    def seconds(self) -> dict[str, float]:
        """Mean seconds per step since the last call, of each of PHASES; empty without a step.

        It waits for the last step.
        """
        for step in self._waiting:
            self._add(step)
        self._waiting.clear()
        count, self._count = self._count, 0
        found = {name: self._sums[name] / 1000 / count for name in PHASES} if count else {}
        self._sums.clear()
        return found

    def _stepping(self, train_batch: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            while self._waiting and self._waiting[0].end.query():
                self._add(self._waiting.pop(0))
            current = self._current = _Step(moment(self._device))
            try:
                result = train_batch(*args, **kwargs)
            finally:
                self._current = None  # an evaluation is in no phase
            current.end = moment(self._device)
            self._waiting.append(current)
            return result

        return step

    def _timed(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._current is None:
                return run(*args, **kwargs)
            before = moment(self._device)
            result = run(*args, **kwargs)
            self._current.spans.append((name, before, moment(self._device)))
            return result

        return timed

    def _begins_backward(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def begin(*args: Any) -> None:
            self._before = moment(self._device)
            run(*args)

        return begin

    def _ends_backward(self, run: Callable[..., Any]) -> Callable[..., Any]:
        reduces = self._timed(REDUCTION, run) if self._sends else run

        def end() -> None:
            reduces()
            if self._current is not None:
                self._current.spans.append((BACKWARD, self._before, moment(self._device)))

        return end

    def _iterating(self, to_device: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def iterate(*args: Any) -> Iterator[Any]:
            before = HostEvent()
            batches = iter(to_device(*args))  # which may read all of them
            while True:
                batch = next(batches, None)
                if self._current is not None:
                    self._current.spans.append((DATA, before, HostEvent()))
                if batch is None:
                    return
                yield batch
                before = HostEvent()

        return iterate

    def _add(self, step: _Step) -> None:
        step.end.synchronize()
        for name, before, after in step.spans:
            self._sums[name] += before.elapsed_time(after)
            self._sums[BOTH] -= before.elapsed_time(after) if name == OPTIMIZER else 0.0
        self._sums[BOTH] += step.start.elapsed_time(step.end)
        self._count += 1


def _wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Any]) -> None:
    """Replaces the attribute of this one object."""
    setattr(owner, name, around(getattr(owner, name)))
