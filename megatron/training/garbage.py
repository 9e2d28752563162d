"""Garbage collection at chosen steps, the same on all ranks.

Left to itself Python collects after some count of allocations, at another moment on each rank, and
in a step all ranks wait for the one that does; what it looks through grows with what was imported.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from types import TracebackType

EVERY = 50
"""Steps between two collections of young objects. A step leaves few cycles and no tensor in them:
under ZeRO-3 some 30 small objects, else none."""

YOUNG = 1  # what a step makes; an older one is looked at by `collect` only


class Garbage(AbstractContextManager["Garbage"]):
    """Inside it nothing is collected but here; what is alive at its start is never looked at."""

    def __enter__(self) -> Garbage:
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        gc.enable()
        gc.unfreeze()

    def step_ended(self, iteration: int) -> None:
        """Collects young objects every EVERY steps."""
        if iteration % EVERY == 0:
            gc.collect(YOUNG)

    def collect(self) -> None:
        """Collects all objects: for moments that are in no step."""
        gc.collect()
