"""Resuming a run: what is loaded from its newest sound checkpoint, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint import store
from megatron.checkpoint.state import RunState
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig, by_key
from megatron.config.skip import merge, ranges_text
from megatron.data.data_record import DataRecord
from megatron.engine import Engine
from megatron.parallel.control import ALONE, Control
from megatron.training.changes import changes_text
from megatron.training.log import ALIKE
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer
from megatron.training.run_data import continue_data

log = logging.getLogger(__name__)


class MissingCheckpoint(RuntimeError):
    """No usable checkpoint where one was required."""

    exit_status = 4


def resume(
    run: RunConfig, engine: Engine, data: DataRecord | None = None, control: Control = ALONE
) -> RunState:
    """Loads the newest sound checkpoint, written in any layout; called by all ranks.

    Args:
        run: the configuration.
        engine: to load into.
        data: the record of this start's data.
        control: messages between all ranks.

    Returns:
        The run's state; that of a run's start where there is no checkpoint.

    Raises:
        MissingCheckpoint: there is none and --exit-on-missing-checkpoint was given, or all are
            damaged.
        ConfigError: its model or optimizer differs, or a range to skip has passed.
        DataError: it was trained on other data.
    """
    root = run.load_folder
    # Another run's folder is read only.
    own = root == run.checkpoint_folder
    found = store.newest_sound(root, control, partial(log.error, extra=ALIKE), set_aside=own)
    checkpoint = found.checkpoint
    if checkpoint is None:
        _refuse_where_required(run, root, found)
        return _with_data(run, RunState(skip_ranges=run.skip_ranges), data, root)
    manifest = checkpoint.manifest
    _check_model(run, manifest["model"], checkpoint.folder)
    state = _with_data(run, checkpoint.state(), data, checkpoint.folder)
    # A checkpoint imported from Hugging Face has weights only.
    if manifest["optimizer"] is not None:
        _check_optimizer(run, manifest, checkpoint.folder)
    restore(engine, checkpoint)
    log.info(f"resumed from {checkpoint.folder} (written as {manifest['layout']})")
    changes = changes_text(run, manifest.get("run", {}), state.iteration)
    if changes:
        log.warning(changes, extra=ALIKE)
    return _with_ranges(run, state)


def restore(engine: Engine, checkpoint: store.Checkpoint) -> None:
    """Loads a checkpoint's weights and, where it has them, its optimizer states; a collective."""
    manifest, reader = checkpoint.manifest, checkpoint.reader()
    with_optimizer = manifest["optimizer"] is not None
    shards = engine.shards()
    shards.load(reader.for_piece, load_optimizer=with_optimizer)
    if with_optimizer:
        shards.load_counters(manifest["counters"])
        shards.load_scaler_state(manifest["loss_scaler"])
        if isinstance(engine.optimizer, WholeMatrixOptimizer):
            engine.optimizer.load_pieces(reader)


def _with_data(run: RunConfig, state: RunState, data: DataRecord | None, where: Path) -> RunState:
    if data is None:
        return state
    return continue_data(state, data, run.data.allow_data_change, str(where))


def _refuse_where_required(run: RunConfig, root: Path, found: store.Found) -> None:
    if found.damaged:
        raise MissingCheckpoint(
            f"every checkpoint in {root} is damaged (see above); repair or move them, or start a"
            " new run with another RUN_NAME"
        )
    if run.checkpoint.exit_on_missing_checkpoint:
        raise MissingCheckpoint(f"--exit-on-missing-checkpoint: {root} holds no checkpoint")
    if run.checkpoint.load:
        log.warning(
            f"LOAD={root} holds no checkpoint: training starts from new weights", extra=ALIKE
        )


def _check_model(run: RunConfig, stored: Mapping[str, Any], folder: Path) -> None:
    changed = run.model.changes_since(stored)
    if changed:
        rows = [line.split(" ", 1) for line in changed]
        named = [f"{by_key()[f'model.{field}'].name} {values}" for field, values in rows]
        raise ConfigError(
            f"{folder} is of another model: {', '.join(named)}; set these as they were, or start"
            " a new run with another RUN_NAME"
        )


def _check_optimizer(run: RunConfig, manifest: Mapping[str, Any], folder: Path) -> None:
    stored, optimizer = manifest["optimizer"], run.optimizer
    if stored != optimizer.optimizer:
        raise ConfigError(
            f"OPT={optimizer.optimizer}, but {folder} holds the states of {stored}, which it"
            f" cannot use; set OPT={stored}, or start a new run with another RUN_NAME"
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
