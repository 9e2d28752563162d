#!/usr/bin/env python3
"""Our checkpoints to Hugging Face folders (Llama, SmolLM3) and back, from and for any layout.

    python3 tools/convert_hf.py export RUN OUT [--iteration N] [--dtype bfloat16]
    python3 tools/convert_hf.py import HF_FOLDER RUN

RUN is a run's folder. An imported model is step 0 of a run that any layout can start from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from megatron.checkpoint import huggingface, store
from megatron.checkpoint.state import RunState
from megatron.checkpoint.tensors import TensorReader, write_pieces
from megatron.data.prepare.tokenizer_export import export_tokenizer
from megatron.training.checkpointing import SHAPE_FIELDS
from megatron.training.optimizers.schedule_free import evaluation_weight

VARIABLES = {
    "num_layers": "NLAYERS",
    "hidden_size": "HIDDEN",
    "num_attention_heads": "HEADS",
    "num_key_value_heads": "NUM_KV_HEAD",
    "ffn_hidden_size": "FFN_HIDDEN_SIZE",
    "vocab_size": "VOCAB_SIZE",
    "nope_interval": "NOPE_INTERVAL",
    "rope_theta": "ROPE_THETA",
    "rope_scaling": "ROPE_SCALING",
}
"""Shape field -> variable that sets it, for the command that trains an imported model."""


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
    shape = huggingface.Shape(
        **checkpoint.manifest["model"], seq_length=settings["model"]["seq_length"]
    )
    out.mkdir(parents=True, exist_ok=True)
    files = huggingface.export_weights(
        _weights(TensorReader(checkpoint.files("tensors")), checkpoint.manifest), shape, out, dtype
    )
    eod = export_tokenizer(
        settings["data"]["tokenizer_type"], settings["data"]["tokenizer_model"], out
    )
    name = str(dtype).removeprefix("torch.")
    config = huggingface.config_json(shape, name, eod)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    print(f"step {checkpoint.iteration} of {run}: {len(files)} weight file(s), {name}, in {out}")
    return 0


def import_model(folder: Path, run: Path) -> int:
    """Makes a Hugging Face model the first checkpoint of a run."""
    shape = huggingface.read_shape(folder)
    padded = -(-shape.vocab_size // 128) * 128
    root = run / "checkpoints"
    store.save(
        root,
        0,
        lambda path: write_pieces(path, huggingface.import_pieces(folder, shape, padded)),
        {
            "state": RunState().to_dict(),
            "model": {name: getattr(shape, name) for name in SHAPE_FIELDS},
            "optimizer": None,
            "layout": f"Hugging Face, {folder}",
            "run": {},
        },
    )
    print(f"{folder} is step 0 of {run}; train it with\n\n    {_command(shape, run)}")
    return 0


def _find(run: Path, iteration: int | None) -> store.Checkpoint | None:
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    for checkpoint in store.committed(root):
        if iteration in (None, checkpoint.iteration):
            return checkpoint
    return None


def _weights(reader: TensorReader, manifest: dict[str, Any]) -> Callable[[str], Tensor]:
    """Name -> the weight that the model is evaluated with."""

    def read(name: str) -> Tensor:
        weight = reader.whole(name)
        if manifest["optimizer"] == "adamwschedulefree" and "z" in reader.states(name):
            beta1 = manifest["run"]["optimizer"]["adam_beta1"]
            return evaluation_weight(weight, reader.whole(name, "z"), beta1)
        return weight

    return read


def _command(shape: huggingface.Shape, run: Path) -> str:
    values = [f"RUN_DIR={run}"]
    for name, variable in VARIABLES.items():
        value = getattr(shape, name)
        if value is not None:
            values.append(
                f"{variable}={value:g}" if isinstance(value, float) else f"{variable}={value}"
            )
    if shape.tie_embeddings:
        values.append("TIE_EMBEDDINGS=1")
    return " ".join(values) + f" bash train_alcf.sh --layernorm-epsilon {shape.rms_norm_eps:g}"


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
