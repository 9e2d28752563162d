#!/usr/bin/env python3
"""Our checkpoints to Hugging Face folders and back, from and for any layout.

    python3 tools/convert_hf.py export RUN OUT [--iteration N] [--dtype bfloat16]
    python3 tools/convert_hf.py import HF_FOLDER RUN

RUN is a run's folder. An imported model is step 0 of a run that any layout can start from.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from megatron.checkpoint import huggingface, store
from megatron.checkpoint.retention import KEEP_ALL
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.state import RunState
from megatron.checkpoint.tensors import TensorReader
from megatron.config.shape import IDENTITY, ModelShape
from megatron.data.prepare.tokenizer_export import export_tokenizer
from megatron.parallel.control import ALONE
from megatron.training.optimizers.schedule_free import evaluation_weight


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0; 2 for what does not fit; 4 without a sound checkpoint."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "export":
            return export(
                arguments.run, arguments.out, arguments.iteration, getattr(torch, arguments.dtype)
            )
        return import_model(arguments.folder, arguments.run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def export(run: Path, out: Path, iteration: int | None, dtype: torch.dtype) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder."""
    checkpoint = _find(run, iteration)
    if checkpoint is None:
        which = "" if iteration is None else f" of step {iteration}"
        print(f"error: {run} holds no checkpoint{which}", file=sys.stderr)
        return 4
    damage = store.damage(checkpoint)
    if damage:
        print("error: " + "\n".join(damage), file=sys.stderr)
        return 4
    settings = checkpoint.manifest["run"]
    shape = ModelShape(**checkpoint.manifest["model"], seq_length=settings["model"]["seq_length"])
    reader = checkpoint.reader()
    out.mkdir(parents=True, exist_ok=True)
    files = huggingface.export_weights(
        _weights(reader, checkpoint.manifest), reader.names(), shape, out, dtype
    )
    eod = export_tokenizer(
        settings["data"]["tokenizer_type"], settings["data"]["tokenizer_model"], out
    )
    name = str(dtype).removeprefix("torch.")
    huggingface.write_config(shape, out, name, eod)
    print(f"step {checkpoint.iteration} of {run}: {len(files)} weight file(s), {name}, in {out}")
    return 0


def import_model(folder: Path, run: Path) -> int:
    """Makes a Hugging Face model the first checkpoint of a run."""
    shape = huggingface.read_shape(folder)
    saver = Saver(run / "checkpoints", ALONE, KEEP_ALL, asynchronous=False, warn=_warn)
    state = RunState().to_dict()
    data = state.pop("data")
    saved = saver.save(
        0,
        huggingface.import_pieces(folder, shape),
        {
            "state": state,
            "model": shape.identity(),
            "optimizer": None,
            "layout": f"Hugging Face, {folder}",
            "run": {},
        },
        data,
    )
    assert saved is not None
    if saved.path is None:
        raise OSError(saved.error)
    print(f"{folder} is step 0 of {run}; train it with\n\n    {_command(shape, run)}")
    return 0


def _find(run: Path, iteration: int | None) -> store.Checkpoint | None:
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    for checkpoint in store.committed(root, _warn):
        if iteration in (None, checkpoint.iteration):
            return checkpoint
    return None


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _weights(reader: TensorReader, manifest: dict[str, Any]) -> Callable[[str], Tensor]:
    """Name -> the weight that the model is evaluated with."""

    def read(name: str) -> Tensor:
        weight = reader.whole(name)
        if manifest["optimizer"] == "adamwschedulefree" and "z" in reader.states(name):
            beta1 = manifest["run"]["optimizer"]["adam_beta1"]
            return evaluation_weight(weight, reader.whole(name, "z"), beta1)
        return weight

    return read


def _command(shape: ModelShape, run: Path) -> str:
    """The command that trains an imported model, with all settings that a resume must keep."""
    values, flags = [f"RUN_DIR={run}"], []
    for field in dataclasses.fields(shape):
        value, option = getattr(shape, field.name), field.metadata
        if field.name not in IDENTITY or value is None or value is False:
            continue
        text = (
            f"{value:g}"
            if isinstance(value, float)
            else str(int(value) if value is True else value)
        )
        if option["env"]:
            values.append(f"{option['env'][0]}={text}")
        else:
            flags.append(f"{option['flags'][0]} {text}")
    return " ".join([*values, "bash train_alcf.sh", *flags])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="our checkpoint -> Hugging Face folder")
    out.add_argument("run", type=Path, help="the run's folder")
    out.add_argument("out", type=Path, help="folder to write")
    out.add_argument("--iteration", type=int, help="step to export; default the newest")
    out.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    into = commands.add_parser("import", help="Hugging Face folder -> step 0 of a run")
    into.add_argument("folder", type=Path, help="with config.json and *.safetensors")
    into.add_argument("run", type=Path, help="the run's folder; made where missing")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
