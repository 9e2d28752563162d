"""The checkpoints of a start: begun by the Trainer, ended behind the steps, exported, logged."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from megatron.checkpoint.retention import Retention
from megatron.checkpoint.saver import Saved, Saver
from megatron.checkpoint.state import RunState
from megatron.config.schema import RunConfig
from megatron.engine import Engine, Shards
from megatron.launch.heartbeat import Heartbeat
from megatron.parallel.control import Control
from megatron.parallel.piece import Piece
from megatron.training.hf_export import Exporter
from megatron.training.log import ALIKE
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer

log = logging.getLogger(__name__)

EXPORT_GRACE_S = 30.0
"""Seconds that a run which is asked to stop waits for an export."""


def manifest_of(run: RunConfig) -> dict[str, Any]:
    """The run's entries in the manifests of its checkpoints."""
    return {
        "model": run.model.identity(),
        "optimizer": run.optimizer.optimizer,
        "layout": str(run.layout),
        "run": run.to_dict(),
    }


def save_checkpoint(
    saver: Saver, shards: Shards, optimizer: Optimizer, state: RunState, manifest: Mapping[str, Any]
) -> Saved | None:
    """Saves the weights and optimizer states of all ranks; called by all of them.

    Args:
        saver: of the run.
        shards: what this rank owns.
        optimizer: whose states these are.
        state: of the run.
        manifest: of the run, by `manifest_of`.

    Returns:
        What came of it; None where it goes on behind the steps to come.
    """
    pieces: Iterable[Piece] = shards.pieces()
    if isinstance(optimizer, WholeMatrixOptimizer):
        pieces = itertools.chain(pieces, optimizer.pieces())
    counters = state.to_dict()
    data = counters.pop("data")
    about = {
        "state": counters,
        "counters": shards.counters(),
        "loss_scaler": shards.scaler_state(),
        **manifest,
    }
    return saver.save(state.iteration, pieces, about, data)


class Saves:
    """The saves of one start; all ranks call the same methods in the same order.

    Args:
        run: the configuration.
        engine: whose weights and optimizer states are saved.
        control: all ranks.
        heartbeat: tells the launcher that a save makes progress.
        since: step that the start resumed from.
        done: takes each save that is committed.

    Attributes:
        at: step of the newest checkpoint that this start committed or resumed from; -1: none.
        error: of the last save that failed.
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        control: Control,
        heartbeat: Heartbeat,
        since: int,
        done: Callable[[Saved], None],
    ) -> None:
        self.at, self.error = since or -1, ""
        self._engine, self._heartbeat, self._done = engine, heartbeat, done
        self._shards, self._manifest = engine.shards(), manifest_of(run)
        keep = run.checkpoint
        exports = keep.export_hf and control.rank == 0
        self._exporter = Exporter(run, log.warning) if exports else None
        self._off = run.optimizer.lr_finder  # its weights are spoilt, and nothing is to resume them
        self._saver = Saver(
            run.checkpoint_folder,
            control,
            Retention(keep.keep_last, keep.keep_every, keep.keep_best),
            asynchronous=keep.async_save,
            warn=log.warning,
            tick=heartbeat.tick,
            in_use=lambda: self._exporter.needed if self._exporter else (),
        )

    @property
    def in_flight(self) -> bool:
        """Whether a save goes on behind the steps; the same on all ranks."""
        return self._saver.in_flight

    @property
    def pending(self) -> bool:
        """Whether this rank still works on it; no collective."""
        return self._saver.pending

    def save(self, state: RunState, validation_loss: float | None = None) -> None:
        """Saves a state, at once or behind the steps to come; a failure is logged as an error.

        With LR_FINDER=1 nothing is saved.
        """
        if self._off:
            return
        self.finish()  # one at a time
        self._heartbeat.enter("save", state.iteration)
        known = {} if validation_loss is None else {"validation_loss": validation_loss}
        saved = save_checkpoint(
            self._saver, self._shards, self._engine.optimizer, state, self._manifest | known
        )
        self._note(saved)

    def carry_on(self) -> None:
        """Takes the save in flight to its next phase, once no rank is `pending`."""
        self._note(self._saver.advance())

    def finish(self) -> None:
        """Returns once no save is in flight."""
        self._note(self._saver.wait())

    def close(self, *, at_once: bool) -> None:
        """Waits for what is still exported; no longer than EXPORT_GRACE_S where `at_once`."""
        if self._exporter:
            self._heartbeat.enter("export")
            self._exporter.close(EXPORT_GRACE_S if at_once else None, self._heartbeat.tick)

    def _note(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.path is None:
            self.error = saved.error
            log.error(
                f"{saved.error}; the run continues, older checkpoints are intact", extra=ALIKE
            )
            return
        self.at = saved.iteration
        if self._exporter:
            self._exporter.start(saved.path)
        self._done(saved)
