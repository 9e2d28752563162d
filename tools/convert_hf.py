#!/usr/bin/env python3
"""Our checkpoints to Hugging Face folders, and those of others into runs, for any layout.

    python3 tools/convert_hf.py export RUN OUT [--iteration N] [--dtype bfloat16]
    python3 tools/convert_hf.py import FOLDER RUN [--data LIST] [--weights-only] [--vocab-size N]

RUN is a run's folder. FOLDER holds a Hugging Face model, which becomes step 0 of the run, or
checkpoints of Megatron-DeepSpeed (model files, pipeline layers, ZeRO 0-3, Universal), of which the
newest becomes the step that it was, with the optimizer's states. Any layout goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint import foreign, huggingface, imported, reference, store
from megatron.checkpoint.reference_files import WEIGHTS_ONLY, open_reference
from megatron.checkpoint.retention import KEEP_ALL
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.state import RunState
from megatron.config.shape import IDENTITY, ModelShape
from megatron.data.data_list import parse_data_list
from megatron.data.prepare.checks import check_files
from megatron.display.progress import progress
from megatron.parallel.control import ALONE
from megatron.parallel.piece import Piece
from megatron.training.hf_export import DTYPES, export_checkpoint

LONGEST = 4096  # tokens in a sample that the printed command proposes at most
GOES_ON = ("LR=2e-5", "MIN_LR=2e-6", "TRAIN_ITERS=1000")
"""For a model that has been trained: the presets' are for one from its start."""
LIST = "LIST"  # stands for data that the user has


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0; 2 for what does not fit; 4 without a sound checkpoint."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "export":
            return export(arguments.run, arguments.out, arguments.iteration, arguments.dtype)
        return import_model(arguments)
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
    with progress("checking the checkpoint's files"):
        damage = store.damage(checkpoint)
    if damage:
        print("error: " + "\n".join(damage), file=sys.stderr)
        return 4
    with progress("exporting", len(checkpoint.reader().names()), "weights") as bar:

        def counted() -> bool:
            bar.advance()
            return False

        written = export_checkpoint(checkpoint, out, run, dtype, _warn, abandoned=counted)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"step {checkpoint.iteration} of {run}: {size:,} bytes of {written} weights in {out}")
    return 0


def import_model(arguments: argparse.Namespace) -> int:
    """Makes what others wrote the first checkpoint of a run."""
    folder, run = arguments.folder, arguments.run
    if folder.suffix == ".pt":  # mp_rank_00_model_states.pt stands for the step that it is of
        folder = folder.parent
    present = store.committed(run / "checkpoints", _warn)
    if present:
        raise ValueError(
            f"{run} holds checkpoints already, the newest of step {present[0].iteration}: import "
            "into a new folder"
        )
    kind = foreign.kind_of(folder)
    if kind is foreign.REFERENCE:
        if arguments.data:
            raise ValueError("--data is for Hugging Face models: others go on with their own data")
        return import_reference(folder, run, arguments.weights_only, arguments.vocab_size)
    if not (folder / huggingface.CONFIG).is_file():
        raise ValueError(f"{folder} {foreign.contents(folder)}")
    for name in ("weights_only", "vocab_size"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is for Megatron-DeepSpeed's checkpoints")
    return import_hugging_face(folder, run, arguments.data)


def import_hugging_face(folder: Path, run: Path, data: str | None) -> int:
    """A model as step 0."""
    shape = huggingface.read_shape(folder)
    if data is not None:
        check_files(parse_data_list(data, "--data"), shape.vocab_size).raise_problems()
    kept = imported.keep(folder, run)
    about = _about(shape, RunState(), None, f"Hugging Face, {folder}")
    _save(run, 0, huggingface.import_pieces(folder, shape), about)
    chosen = (f"DATA_FILE_LIST={data or LIST}", *GOES_ON)
    config = huggingface.read_config(folder)
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if config.get(name):
            _warn(f"{name}={config[name]} is not applied in training")
    print(
        f"{folder} is step 0 of {run}; train it with\n\n"
        f"    {_command(shape, run, kept, chosen=chosen)}\n"
    )
    if data is None:
        print(f"where {LIST} is a data list made with its tokenizer, or DATA=TEXT a text instead.")
    print(f"The model was made for {shape.seq_length} tokens (SEQ). Later starts: --resume {run}")
    return 0


def import_reference(folder: Path, run: Path, weights_only: bool, vocab_size: int | None) -> int:
    """A checkpoint of Megatron-DeepSpeed as the step that it was."""
    found = open_reference(folder, weights_only=weights_only)
    shape = reference.shape_of(found, vocab_size)
    state = reference.state_of(found)
    optimizer = None if found.step is None else reference.optimizer_of(found)
    about = _about(shape, state, optimizer, f"Megatron-DeepSpeed ({found.form}), {found.folder}")
    _save(run, state.iteration, reference.pieces(found, shape, _warn), about)
    states = f"the states of OPT={optimizer}" if optimizer else "no states of the optimizer"
    print(
        f"{found.folder} ({found.form}) is step {state.iteration} of {run}, with {states}, after "
        f"{state.consumed_samples:,} samples\nand {state.consumed_tokens:,} tokens; go on with\n\n"
        f"    {_command(shape, run, None, optimizer)}\n\n"
        "and with TOKENIZER_TYPE, TOKENIZER_MODEL, DATA_FILE_LIST, the batch and the learning rates"
        " of that run.\nDATA_ORDER=megatron goes on with its sample order; FINETUNE=1 "
        f"LOAD={run}/checkpoints and another\nRUN_NAME begin a new run from the weights."
    )
    return 0


def _about(
    shape: ModelShape, state: RunState, optimizer: str | None, layout: str
) -> dict[str, Any]:
    """The entries of a manifest."""
    counters = state.to_dict()
    del counters["data"]
    about: dict[str, Any] = {
        "state": counters,
        "model": shape.identity(),
        "optimizer": optimizer,
        "layout": layout,
        "run": {},
    }
    return about if optimizer is None else about | {"counters": {}, "loss_scaler": {}}


def _save(run: Path, step: int, pieces: Iterable[Piece], about: dict[str, Any]) -> None:
    with progress("importing", unit="blocks written") as bar:
        written = partial(bar.advance, 1)
        root = run / "checkpoints"
        saver = Saver(root, ALONE, KEEP_ALL, asynchronous=False, warn=_warn, tick=written)
        saved = saver.save(step, pieces, about, [])
    assert saved is not None
    if saved.path is None:
        raise OSError(saved.error)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _find(run: Path, iteration: int | None) -> store.Checkpoint | None:
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    for checkpoint in store.committed(root, _warn):
        if iteration in (None, checkpoint.iteration):
            return checkpoint
    return None


def _command(
    shape: ModelShape,
    run: Path,
    kept: Path | None,
    optimizer: str | None = None,
    chosen: Sequence[str] = (),
) -> str:
    """The command that trains an imported model, with all settings that a resume must keep."""
    length = shape.seq_length if kept is None else min(shape.seq_length, LONGEST)
    values, flags = [f"RUN_DIR={run}", f"SEQ={length}"], []
    names = [] if kept is None else [path.name for path in imported.tokenizer_files(kept)]
    if "tokenizer.json" in names:
        values += ["TOKENIZER_TYPE=HFTokenizer", f"TOKENIZER_MODEL={kept}"]
    elif kept is not None and "tokenizer.model" in names:
        model = kept / "tokenizer.model"
        values += ["TOKENIZER_TYPE=SentencePieceTokenizer", f"TOKENIZER_MODEL={model}"]
    if optimizer is not None:
        values.append(f"OPT={optimizer}")
    for field in dataclasses.fields(shape):
        value, option = getattr(shape, field.name), field.metadata
        if field.name not in IDENTITY or value is None or value is False:
            continue
        text = str(int(value) if value is True else value)
        if option["env"]:
            values.append(f"{option['env'][0]}={text}")
        else:
            flags.append(f"{option['flags'][0]} {text}")
    return " ".join([*values, *chosen, "bash train_alcf.sh", *flags])


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
    into = commands.add_parser("import", help="checkpoints of others -> first step of a run")
    into.add_argument("folder", type=Path, help="a Hugging Face model, or global_step* folders")
    into.add_argument("run", type=Path, help="the run's folder; made where missing")
    into.add_argument(
        WEIGHTS_ONLY, action="store_true", help="leave out the optimizer's states and its files"
    )
    into.add_argument("--data", metavar="LIST", help="data list that the printed command names")
    into.add_argument(
        "--vocab-size",
        type=int,
        help="tokens of the tokenizer; rows beyond it are padding. Default: what the checkpoint "
        "says, or all rows",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
