"""A run's model as one of transformers, with the weights that the run begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.checkpoint.huggingface import read_shape
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.config.shape import IDENTITY, ModelShape
from megatron.model.stack import Stack
from megatron.training.build import model_layers

UNSHARDED = ("tensor_parallel", "pipeline_parallel", "sequence_parallel")


def shape_settings(folder: Path) -> dict[str, str]:
    """The settings of the model in a Hugging Face folder, but for the length of its samples.

    Raises:
        ConfigError: there is no model, or none that we know.
    """
    try:
        shape = read_shape(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model_name_or_path {folder}: {error}") from None
    found = {}
    for name in sorted(IDENTITY):
        value, option = getattr(shape, name), ModelShape.__dataclass_fields__[name].metadata
        if value is not None and option["env"]:
            found[option["env"][0]] = str(int(value) if isinstance(value, bool) else value)
    return found


def hugging_face_model(run: RunConfig, folder: Path | None) -> nn.Module:
    """The model, in fp32, which the Trainer's autocast needs for DTYPE=bf16 as well.

    Args:
        run: the configuration.
        folder: holds the weights; None: those that our run would begin with, by its SEED.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder is not None:
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return loaded
    entries = dict(run.architecture.hugging_face_config(run.model))
    config: Any = AutoConfig.for_model(entries.pop("model_type"), **entries)
    kind: Any = AutoModelForCausalLM
    model: nn.Module = kind.from_config(config, dtype=torch.float32)
    _copy_first_weights(run, model)
    return model


def _copy_first_weights(run: RunConfig, model: nn.Module) -> None:
    ours = dict(Stack(model_layers(run)).named_parameters())
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, other in run.architecture.hugging_face_names(run.model).items():
            rows = theirs[other].shape[0]  # ours are padded
            theirs[other].copy_(ours[name][:rows])


def require_unsharded(run: RunConfig) -> None:
    """Refuses what Hugging Face's Trainer cannot do.

    Raises:
        ConfigError: a layout other than data parallelism, or a batch that grows.
    """
    wrong = [f"{name}={value}" for name in UNSHARDED if (value := getattr(run.parallel, name)) > 1]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: Hugging Face's Trainer divides samples, and weights by "
            "--fsdp=true: set TP, PP and SP to 1"
        )
    if run.train.rampup_batch_size or run.data.train_range_to_skip:
        raise ConfigError("RAMPUP_BATCH_SIZE and TRAIN_RANGE_TO_SKIP are for train_alcf.sh alone")
