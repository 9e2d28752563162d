"""How far a run is and how long it will take: a short line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta


class Progress:
    """Estimates a run's rest from the wall time of its steps, evaluation and saving included.

    The first step seen is the origin: what came before it (start-up, compilation) says nothing
    about the rest.

    Args:
        every: least seconds between two lines.
        clock: seconds, monotonic.
    """

    def __init__(self, every: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._origin: tuple[int, float] | None = None
        self._last = 0.0

    def line(self, iteration: int, train_iters: int) -> str | None:
        """The line after step `iteration`; None where it is too early or nothing is left to do."""
        now = self._clock()
        if self._origin is None:
            self._origin, self._last = (iteration, now), now
            return None
        first, start = self._origin
        if now - self._last < self._every or not first < iteration < train_iters:
            return None
        self._last = now
        steps = train_iters - iteration
        left = timedelta(seconds=round(steps * (now - start) / (iteration - first)))
        return f"progress={iteration / train_iters:.1%} | steps_left={steps} | time_left={left}"
