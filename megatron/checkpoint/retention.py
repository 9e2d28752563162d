"""Which checkpoints stay: the newest, those of every N steps, those of the lowest loss.

Removal invalidates first: a step is renamed, then deleted, so that what a kill leaves behind looks
like no checkpoint. Damaged steps, set aside or not, are never removed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.manifest import DamageError, read_manifest
from megatron.checkpoint.store import step_folder, steps

REMOVING = ".removing"


@dataclass(frozen=True)
class Retention:
    """What is kept besides the step just committed.

    Attributes:
        last: the newest ones; None keeps all.
        every: also steps that are a multiple of this, step 0 included.
        best: also this many with the lowest validation loss.
    """

    last: int | None = None
    every: int | None = None
    best: int | None = None

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps to keep.

        Args:
            losses: step -> validation loss, None where unknown.
        """
        newest_first = sorted(losses, reverse=True)
        if self.last is None:
            return set(newest_first)
        kept = set(newest_first[: self.last])
        if self.every is not None:
            kept |= {step for step in newest_first if step % self.every == 0}
        if self.best is not None:
            known = [(loss, -step) for step, loss in losses.items() if _is_number(loss)]
            kept |= {-step for _, step in sorted(known)[: self.best]}
        return kept


KEEP_ALL = Retention()


def remove_expired(
    root: Path,
    retention: Retention,
    iteration: int,
    losses: dict[int, float | None],
    warn: Callable[[str], None],
    in_use: Collection[Path] = (),
) -> None:
    """Removes what need not be kept after the commit of a step.

    Args:
        root: folder of checkpoints.
        retention: what is kept.
        iteration: the step just committed; it and later ones stay.
        losses: validation losses known so far; those of other steps are added from manifests.
        warn: called where something cannot be removed; the run is none the worse for it.
        in_use: folders that are being read; they stay until the next commit.
    """
    if retention.last is None:
        return
    try:
        present = [step for step in steps(root) if step <= iteration]
    except OSError as error:
        warn(f"old checkpoints are not removed: {error}")
        return
    for step in present:
        if step not in losses:
            try:
                losses[step] = read_manifest(step_folder(root, step), step).get("validation_loss")
            except (DamageError, OSError):
                continue  # damage is looked at by a start, not deleted here
    known = {step: losses[step] for step in present if step in losses}
    expired = sorted(known.keys() - retention.kept(known))
    for step in expired:
        folder = step_folder(root, step)
        if folder in in_use:
            continue
        leaving = folder.with_name(folder.name + REMOVING)
        try:
            if leaving.exists():
                shutil.rmtree(leaving)
            os.rename(folder, leaving)
            shutil.rmtree(leaving)
        except OSError as error:
            warn(f"checkpoint {folder.name} is not removed: {error}")
        del losses[step]


def remove_leftovers(folders: Iterable[Path], warn: Callable[[str], None]) -> None:
    """Removes folders that no step can be read from."""
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            warn(f"{folder} is left over from an earlier start and cannot be removed: {error}")


def _is_number(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
