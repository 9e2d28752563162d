"""Rollback: which steps before a spike are suspect, and which checkpoint the run returns to."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from megatron.checkpoint import store
from megatron.config.skip import Ranges, is_skipped
from megatron.parallel.control import Control
from megatron.training.log import ALIKE

log = logging.getLogger(__name__)


def suspect_steps(spike: int, count: int) -> tuple[int, int]:
    """First and last of the `count` steps that end with the spike: they made it what it is."""
    return max(1, spike - count + 1), spike


def rollback_target(
    root: Path, since: int, suspects: tuple[int, int], ranges: Ranges, control: Control
) -> store.Checkpoint | str:
    """The newest sound checkpoint before the suspect steps; a collective of all ranks.

    Args:
        root: of the run's checkpoints.
        since: step that this start began after; what was before may have had other data.
        suspects: first and last of the steps to undo.
        ranges: steps skipped already.
        control: all ranks.

    Returns:
        The checkpoint, or why there is nothing to return to.
    """
    first, spike = suspects
    if all(is_skipped(step, ranges) for step in range(first, spike)):
        return "the steps before it are skipped already, there is nothing to undo"
    warn = partial(log.error, extra=ALIKE)
    newest = store.newest_sound(root, control, warn, set_aside=False, until=first - 1)
    found = newest.checkpoint
    if found is None or found.iteration < since:
        return (
            f"no checkpoint of this start, which began after step {since}, is before step {first};"
            " save more often (SAVE_INTERVAL) or lower ROLLBACK_STEPS"
        )
    return found
