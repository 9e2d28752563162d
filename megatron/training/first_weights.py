"""FINETUNE: a new run that begins with the weights of another one, or of a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint import foreign, huggingface, store
from megatron.checkpoint.tensors import TensorReader, part_of
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig, by_key
from megatron.engine import Engine, ReadPiece
from megatron.parallel.piece import WEIGHT, Piece
from megatron.training.changes import model_changes
from megatron.training.log import ALIKE
from megatron.training.optimizers.schedule_free import evaluation_weight

log = logging.getLogger(__name__)

FREE = ("rope_theta", "rope_scaling", "nope_interval", "rms_norm_eps")
"""Fields of a model whose change leaves its weights fitting; it is said."""


def model_weights(reader: TensorReader, manifest: Mapping[str, Any]) -> ReadPiece:
    """Reads the weights that the model is evaluated with, and no state, for any layout."""
    averaged = manifest["optimizer"] == "adamwschedulefree"

    def read(piece: Piece) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
        tensors, _ = reader.for_piece(piece)
        weight = tensors[WEIGHT]
        if averaged and "z" in tensors:
            beta1 = manifest["run"]["optimizer"]["adam_beta1"]
            weight = evaluation_weight(weight, tensors["z"], beta1)
        return {WEIGHT: weight}, {}

    return read


def complete(read: ReadPiece, folder: Path, refusal: type[Exception]) -> ReadPiece:
    """`read`, which refuses by name what a folder lacks: no weight has been drawn either."""

    def checked(piece: Piece) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
        try:
            return read(piece)
        except (KeyError, ValueError) as error:
            raise refusal(
                f"{folder} lacks {piece.name}, or a part of it ({error}): begin with another one"
            ) from None

    return checked


def holds_weights(folder: Path, found: store.Found) -> bool:
    """Whether a folder, in which `found` was found, has weights that a run can begin with."""
    return found.checkpoint is not None or foreign.kind_of(folder) is foreign.HUGGING_FACE


def load_first_weights(run: RunConfig, engine: Engine, found: store.Found) -> None:
    """Loads the weights that a run with FINETUNE begins with; a collective.

    Args:
        run: the configuration.
        engine: to load into.
        found: what LOAD holds; without a checkpoint, it is a Hugging Face folder.

    Raises:
        ConfigError: they are of another model, or a Hugging Face folder that cannot be read.
    """
    folder, checkpoint = run.load_folder, found.checkpoint
    if checkpoint is not None:
        folder = checkpoint.folder
        _check_fits(run, checkpoint.manifest["model"], folder)
        read = model_weights(checkpoint.reader(), checkpoint.manifest)
        engine.shards().load(complete(read, folder, ConfigError), load_optimizer=False)
    else:
        try:
            shape = huggingface.read_shape(folder)
            _check_fits(run, shape.identity(), folder)
            whole = huggingface.open_weights(folder, shape)
            engine.shards().load(partial(_part, whole), load_optimizer=False)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:
            raise ConfigError(f"{by_key()['checkpoint.load'].name}={folder}: {error}") from None
    log.info(f"a new run with the weights of {folder}: step 0, new optimizer and schedule")


def _part(
    whole: Callable[[str], Tensor], piece: Piece
) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    return {WEIGHT: part_of(whole(piece.name), piece)}, {}


def _check_fits(run: RunConfig, stored: Mapping[str, Any], folder: Path) -> None:
    """The weights are of a model of this run's shape."""
    changed = model_changes(run, stored)
    for field in FREE:
        if field in changed:
            log.warning(f"FINETUNE: {changed.pop(field)} since {folder} was trained", extra=ALIKE)
    if changed:
        raise ConfigError(
            f"{folder} is of another model: {', '.join(changed.values())}; set these as they were"
        )
