"""The model that a command line names: a run, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from megatron.launch.cpu_types import slow_types

if TYPE_CHECKING:
    from megatron.data.prepare.tokenizer import Tokenizer
    from megatron.training.saved_model import SavedModel, WholeModel


def add_model(parser: argparse.ArgumentParser) -> None:
    """Arguments that name a model, and how it is computed."""
    add = parser.add_argument
    add("model", metavar="RUN", help="a run, a checkpoint, or a Hugging Face folder")
    add("--iteration", type=int, metavar="N", help="step of the run; default the newest")
    add("--dtype", choices=("fp32", "bf16", "fp16"),
        help="of the weights; default the run's, fp32 where the CPU is slow with it")  # fmt: skip
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "xpu"), help="default auto")


def named(options: argparse.Namespace) -> SavedModel:
    """The model that the arguments of `add_model` name, not loaded yet.

    Raises:
        MissingCheckpoint, ConfigError: as `saved_model.find`.
    """
    # Here, so that --help and a wrong argument do not wait for torch.
    from megatron.training.saved_model import find

    return find(options.model, options.iteration)


def loaded(
    saved: SavedModel, options: argparse.Namespace, *, cached: bool = False
) -> tuple[WholeModel, Tokenizer]:
    """A model on the device and in the type that the arguments ask for; says what it is."""
    from megatron.training.device import detect, prepare
    from megatron.training.saved_model import DTYPES, WholeModel

    began = time.perf_counter()
    device = detect(0, saved.dtype, options.device)
    slow = device.kind == "cpu" and saved.dtype in slow_types(os.environ)
    dtype = options.dtype or ("fp32" if slow else saved.dtype)
    prepare(device, dtype)
    tokenizer = saved.tokenizer()
    model = WholeModel(saved, device.torch_device, DTYPES[dtype], eod=tokenizer.eod, cached=cached)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{saved.where}: {size / 1e6:,.1f}M parameters, {dtype} on {device.kind}, loaded in "
        f"{time.perf_counter() - began:.1f} s"
    )
    return model, tokenizer


def say(line: str) -> None:
    """Beside the text or the figures, which go to the standard output."""
    print(line, file=sys.stderr, flush=True)
