"""Resuming a run: what is loaded from its newest sound checkpoint, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint import foreign, store
from megatron.checkpoint.state import RunState
from megatron.config.errors import ConfigError, MissingCheckpoint
from megatron.config.schema import RunConfig
from megatron.config.skip import merge, ranges_text
from megatron.data.data_record import DataRecord
from megatron.engine import Engine
from megatron.launch.heartbeat import Heartbeat
from megatron.parallel.control import ALONE, Control
from megatron.parallel.piece import Piece
from megatron.training.changes import changes_text, model_changes
from megatron.training.first_weights import (
    complete,
    holds_weights,
    load_first_weights,
    model_weights,
)
from megatron.training.log import ALIKE
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer
from megatron.training.run_data import continue_data

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a start's weights come from.

    Attributes:
        root: folder of the checkpoints that it goes on from.
        found: what this holds.
        first: what LOAD holds, where FINETUNE begins with it.
    """

    root: Path
    found: store.Found
    first: store.Found | None = None

    @property
    def has_weights(self) -> bool:
        """Whether every weight is read; else the model's own are drawn."""
        return self.found.checkpoint is not None or self.first is not None


def resume(
    run: RunConfig,
    engine: Engine,
    data: DataRecord | None = None,
    control: Control = ALONE,
    source: Source | None = None,
    heartbeat: Heartbeat | None = None,
) -> RunState:
    """Loads the newest sound checkpoint, written in any layout; called by all ranks.

    A run that began with LOAD goes on from its own checkpoints. With FINETUNE, one that has none
    yet begins with the weights in LOAD.

    Args:
        run: the configuration.
        engine: to load into.
        data: the record of this start's data.
        control: messages between all ranks.
        source: what `find_source` found before the engine was built; None: it is asked now.
        heartbeat: each parameter that is loaded is a tick of it.

    Returns:
        The run's state; that of a run's start where there is no checkpoint.

    Raises:
        MissingCheckpoint, ConfigError: as `find_source` has them; the checkpoint lacks a weight.
        ConfigError: its model or optimizer differs, or a range to skip has passed.
        DataError: it was trained on other data.
    """
    source = source or find_source(run, control)
    checkpoint = source.found.checkpoint
    if checkpoint is None:
        if source.first is not None:
            load_first_weights(run, engine, source.first)
        return _with_data(run, RunState(skip_ranges=run.skip_ranges), data, source.root)
    manifest = checkpoint.manifest
    _check_beginning(run, manifest, checkpoint)
    _check_model(run, manifest["model"], checkpoint.folder)
    state = _with_data(run, checkpoint.state(), data, checkpoint.folder)
    if takes_optimizer(run, manifest):
        _check_optimizer(run, manifest, checkpoint.folder)
    elif run.checkpoint.no_load_optim:
        log.warning(
            f"NO_LOAD_OPTIM=1: the optimizer begins anew after step {state.iteration}; the "
            "checkpoints of this start hold its states, and later starts take them",
            extra=ALIKE,
        )
    restore(run, engine, checkpoint, heartbeat)
    log.info(f"resumed from {checkpoint.folder} (written as {manifest['layout']})")
    changes = changes_text(run, manifest.get("run", {}), state.iteration)
    if changes:
        log.warning(changes, extra=ALIKE)
    return _with_ranges(run, state)


def restore(
    run: RunConfig,
    engine: Engine,
    checkpoint: store.Checkpoint,
    heartbeat: Heartbeat | None = None,
) -> None:
    """Loads a checkpoint's weights and, where they are taken, its optimizer's states.

    A collective; each parameter is a tick of the heartbeat.
    """
    manifest, reader = checkpoint.manifest, checkpoint.reader()
    shards, folder, beats = engine.shards(), checkpoint.folder, heartbeat or Heartbeat()

    def told(piece: Piece) -> tuple[dict[str, Tensor], dict[str, float]]:
        beats.tick()
        return reader.for_piece(piece)

    beats.enter("restore", total=len(shards.spans()))
    if not takes_optimizer(run, manifest):
        read = complete(model_weights(reader, manifest), folder, MissingCheckpoint)
        shards.load(read, load_optimizer=False)
        return
    shards.load(complete(told, folder, MissingCheckpoint))
    shards.load_counters(manifest["counters"])
    shards.load_scaler_state(manifest["loss_scaler"])
    if isinstance(engine.optimizer, WholeMatrixOptimizer):
        engine.optimizer.load_pieces(reader)


def takes_optimizer(run: RunConfig, manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's optimizer states are loaded.

    Imported weights have none. NO_LOAD_OPTIM acts once: a checkpoint that was saved under it has
    the states of the optimizer that began anew.
    """
    if manifest["optimizer"] is None or not run.checkpoint.no_load_optim:
        return manifest["optimizer"] is not None
    began = bool(manifest.get("run", {}).get("checkpoint", {}).get("no_load_optim"))
    return began and bool(manifest["optimizer"] == run.optimizer.optimizer)


def find_source(run: RunConfig, control: Control = ALONE) -> Source:
    """What a start goes on from; a collective, before the engine is built.

    Raises:
        MissingCheckpoint: there is none where LOAD or --exit-on-missing-checkpoint wants one, the
            folder holds checkpoints of others, or all are damaged.
        ConfigError: the run's own checkpoints did not begin with LOAD.
    """
    root, found = _source(run, control)
    if found.checkpoint is not None:
        return Source(root, found)
    _refuse_damaged(root, found)
    if not run.checkpoint.finetune:
        _check_new(run, root, control)
        return Source(root, found)
    _refuse_foreign(run, root, control)
    first = _newest(run.load_folder, control, False)
    _refuse_damaged(run.load_folder, first)
    if not control.first(lambda: holds_weights(run.load_folder, first)):
        raise MissingCheckpoint(
            f"FINETUNE=1: LOAD={run.checkpoint.load} {foreign.contents(run.load_folder)}"
        )
    return Source(root, found, first)


def _source(run: RunConfig, control: Control) -> tuple[Path, store.Found]:
    """The folder to go on from and what it holds.

    A run that began with LOAD has later steps of its own: a job that is started again, by hand or
    by a scheduler, must not lose them.
    """
    folder, load = run.checkpoint_folder, run.load_folder
    own = _newest(folder, control, True)
    if run.checkpoint.finetune or load.resolve() == folder.resolve():
        return folder, own
    if own.checkpoint is not None:
        before = own.checkpoint.manifest.get("run", {}).get("checkpoint", {}).get("load")
        if before and Path(before).resolve() == load.resolve():
            log.info(f"LOAD={run.checkpoint.load}: the run began with it and goes on")
            return folder, own
        raise ConfigError(
            f"LOAD={run.checkpoint.load}, but the run has {own.checkpoint.folder}, which "
            f"{f'began with LOAD={before}' if before else 'began without LOAD'}: unset LOAD to go "
            "on from there, or set another RUN_NAME to begin from LOAD"
        )
    _refuse_damaged(folder, own)
    return load, _newest(load, control, False)  # another run's folder is read only


def _newest(root: Path, control: Control, own: bool) -> store.Found:
    return store.newest_sound(root, control, partial(log.error, extra=ALIKE), set_aside=own)


def _refuse_foreign(run: RunConfig, root: Path, control: Control) -> bool:
    """Whether `root` is where this run saves; it must not hold checkpoints of others."""
    own = root.resolve() == run.checkpoint_folder.resolve()
    if own and control.first(lambda: foreign.kind_of(root) is not None):
        raise MissingCheckpoint(f"{root}, where checkpoints are saved, {foreign.contents(root)}")
    return own


def _check_new(run: RunConfig, root: Path, control: Control) -> None:
    """A run without a checkpoint may begin with new weights."""
    keep, own = run.checkpoint, _refuse_foreign(run, root, control)
    if keep.exit_on_missing_checkpoint:
        raise MissingCheckpoint(f"--exit-on-missing-checkpoint: {root} {foreign.contents(root)}")
    if keep.load and not own:
        raise MissingCheckpoint(
            f"LOAD={keep.load} {foreign.contents(root)}. To begin with new weights unset LOAD"
        )
    if keep.no_load_optim:
        log.warning("NO_LOAD_OPTIM=1 has no effect: there is no checkpoint to load", extra=ALIKE)
    if keep.load:
        log.warning(
            f"LOAD={root} holds no checkpoint: training starts from new weights", extra=ALIKE
        )


def _refuse_damaged(root: Path, found: store.Found) -> None:
    if found.damaged:
        raise MissingCheckpoint(
            f"every checkpoint in {root} is damaged (see above); repair or move them, or start a"
            " new run with another RUN_NAME"
        )


def _check_beginning(
    run: RunConfig, manifest: Mapping[str, Any], checkpoint: store.Checkpoint
) -> None:
    """With FINETUNE: the run's own checkpoints began with the weights of the same LOAD."""
    if not run.checkpoint.finetune:
        return
    before = manifest.get("run", {}).get("checkpoint", {})
    load = before.get("load") if before.get("finetune") else None
    if load is None or Path(load).resolve() != run.load_folder.resolve():
        began = f"began with the weights of {load}" if load else "was started without FINETUNE"
        raise ConfigError(
            f"FINETUNE=1 LOAD={run.checkpoint.load}, but {checkpoint.folder} is of a run that "
            f"{began}: set another RUN_NAME to begin a new run, or unset FINETUNE and LOAD to"
            " go on with that one"
        )
    log.info(f"FINETUNE: the run began with the weights of {load} and goes on")


def _with_data(run: RunConfig, state: RunState, data: DataRecord | None, where: Path) -> RunState:
    if data is None:
        return state
    return continue_data(state, data, run.data.allow_data_change, str(where))


def _check_model(run: RunConfig, stored: Mapping[str, Any], folder: Path) -> None:
    changed = model_changes(run, stored)
    if changed:
        raise ConfigError(
            f"{folder} is of another model: {', '.join(changed.values())}; set these as they were,"
            " or start a new run with another RUN_NAME"
        )


def _check_optimizer(run: RunConfig, manifest: Mapping[str, Any], folder: Path) -> None:
    stored, optimizer = manifest["optimizer"], run.optimizer
    if stored != optimizer.optimizer:
        raise ConfigError(
            f"OPT={optimizer.optimizer}, but {folder} holds the states of {stored}, which it"
            f" cannot use; set OPT={stored}, begin the optimizer anew with NO_LOAD_OPTIM=1,"
            " or start a new run with another RUN_NAME"
        )
    before = manifest.get("run", {}).get("optimizer", {}).get("adam_beta1", optimizer.adam_beta1)
    if stored == "adamwschedulefree" and before != optimizer.adam_beta1:
        raise ConfigError(
            f"ADAM_BETA1={optimizer.adam_beta1}, but {folder} holds weights of OPT={stored} at"
            f" ADAM_BETA1={before}, which says where between the stored points the model lies;"
            f" set ADAM_BETA1={before}, or start a new run with another RUN_NAME"
        )


def _with_ranges(run: RunConfig, state: RunState) -> RunState:
    """The state with this start's ranges to skip; ranges skipped before stay recorded."""
    done, ranges = state.iteration, run.skip_ranges
    before = set(state.skip_ranges)
    for first, last in ranges:
        known = any(a <= first and last <= b for a, b in before)
        if last <= done and not known:
            raise ConfigError(
                f"TRAIN_RANGE_TO_SKIP {first}-{last} has passed: the run is at step {done}; to undo"
                f" these steps resume from a checkpoint before step {first}"
            )
        if first <= done < last and not known:
            log.warning(
                f"of the range to skip {first}-{last}, steps up to {done} have been taken",
                extra=ALIKE,
            )
    merged = merge([*state.skip_ranges, *ranges])
    if merged != ranges:
        log.info(f"ranges to skip, those of the checkpoint included: {ranges_text(merged)}")
    return RunState.from_dict({**state.to_dict(), "skip_ranges": merged})
