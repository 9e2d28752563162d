"""Garbage collection at chosen steps, the same on all ranks.

Left to itself Python collects after some count of allocations, at another moment on each rank, and
in a step all ranks wait for the one that does; what it looks through grows with what was imported.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 50
"""Steps between two collections of young objects. A step leaves few cycles and no tensor in them:
under ZeRO-3 some 30 small objects, else none."""

YOUNG = 1  # what a step makes; an older one is looked at in `saved` only


@contextmanager
def at_chosen_steps() -> Iterator[None]:
    """Inside it nothing is collected but below; what is alive at its start is never looked at."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def step_ended(iteration: int) -> None:
    """Collects young objects every EVERY steps."""
    if iteration % EVERY == 0 and not gc.isenabled():
        gc.collect(YOUNG)


def saved() -> None:
    """Collects all objects: a save is in no step."""
    if not gc.isenabled():
        gc.collect()
