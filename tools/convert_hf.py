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
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint import huggingface, imported, store
from megatron.checkpoint.retention import KEEP_ALL
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.state import RunState
from megatron.config.shape import IDENTITY, ModelShape
from megatron.parallel.control import ALONE
from megatron.training.hf_export import DTYPES, export_checkpoint

LONGEST = 4096  # tokens in a sample that the printed command proposes at most


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0; 2 for what does not fit; 4 without a sound checkpoint."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "export":
            return export(arguments.run, arguments.out, arguments.iteration, arguments.dtype)
        return import_model(arguments.folder, arguments.run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def export(run: Path, out: Path, iteration: int | None, dtype: str | None) -> int:
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
    written = export_checkpoint(checkpoint, out, run, dtype, _warn)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"step {checkpoint.iteration} of {run}: {size:,} bytes of {written} weights in {out}")
    return 0


def import_model(folder: Path, run: Path) -> int:
    """Makes a Hugging Face model the first checkpoint of a run."""
    shape = huggingface.read_shape(folder)
    root = run / "checkpoints"
    present = store.committed(root, _warn)
    if present:
        raise ValueError(
            f"{run} holds checkpoints already, the newest of step {present[0].iteration}: import "
            "into a new folder"
        )
    kept = imported.keep(folder, run)
    state = RunState().to_dict()
    data = state.pop("data")
    about = {
        "state": state,
        "model": shape.identity(),
        "optimizer": None,
        "layout": f"Hugging Face, {folder}",
        "run": {},
    }
    saver = Saver(root, ALONE, KEEP_ALL, asynchronous=False, warn=_warn)
    saved = saver.save(0, huggingface.import_pieces(folder, shape), about, data)
    assert saved is not None
    if saved.path is None:
        raise OSError(saved.error)
    dropout = huggingface.read_config(folder).get("attention_dropout")
    if dropout:
        _warn(f"attention_dropout={dropout} is not applied in training")
    print(
        f"{folder} is step 0 of {run}; train it with\n\n    {_command(shape, run, kept)}\n\n"
        "and with DATA_FILE_LIST, LR, MIN_LR and TRAIN_ITERS of your own: the preset's are for a "
        f"small model from\nits start. The model was made for {shape.seq_length} tokens (SEQ)."
    )
    return 0


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _find(run: Path, iteration: int | None) -> store.Checkpoint | None:
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    for checkpoint in store.committed(root, _warn):
        if iteration in (None, checkpoint.iteration):
            return checkpoint
    return None


def _command(shape: ModelShape, run: Path, kept: Path) -> str:
    """The command that trains an imported model, with all settings that a resume must keep."""
    values, flags = [f"RUN_DIR={run}", f"SEQ={min(shape.seq_length, LONGEST)}"], []
    names = [path.name for path in imported.tokenizer_files(kept)]
    if "tokenizer.json" in names:
        values += ["TOKENIZER_TYPE=HFTokenizer", f"TOKENIZER_MODEL={kept}"]
    elif "tokenizer.model" in names:
        model = kept / "tokenizer.model"
        values += ["TOKENIZER_TYPE=SentencePieceTokenizer", f"TOKENIZER_MODEL={model}"]
    for field in dataclasses.fields(shape):
        value, option = getattr(shape, field.name), field.metadata
        if field.name not in IDENTITY or value is None or value is False:
            continue
        text = str(int(value) if value is True else value)
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
    out.add_argument(
        "--dtype",
        choices=sorted(DTYPES.values()),
        help="of the weights; default that of the imported model, else float32",
    )
    into = commands.add_parser("import", help="Hugging Face folder -> step 0 of a run")
    into.add_argument("folder", type=Path, help="with config.json and *.safetensors")
    into.add_argument("run", type=Path, help="the run's folder; made where missing")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
