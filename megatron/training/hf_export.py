"""A committed checkpoint as a Hugging Face folder: by the tool, or behind the steps (EXPORT_HF).

Everything is read from disk, so an export needs neither the run's other ranks nor its device.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import huggingface, imported, store
from megatron.checkpoint.export_folder import exporting, remove_unfinished
from megatron.checkpoint.tensors import TensorReader
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.config.shape import ModelShape
from megatron.data.prepare.tokenizer import build_tokenizer
from megatron.data.prepare.tokenizer_export import export_tokenizer
from megatron.training.optimizers.schedule_free import evaluation_weight

Warn = Callable[[str], None]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""DTYPE of a run -> torch's name of it."""

EXPORTS = "huggingface"
"""In a run's folder: the exports of EXPORT_HF."""

# Texts that tokenizers with other merges or another treatment of spaces split differently.
_PROBE = "The year 2024: 1,234.5 kg  of\n\n\tna\u00efve code() {x = y+1;} DON'T \u4f60\u597d"


class Abandoned(Exception):
    """An export was told to stop before its end."""


def export_checkpoint(
    checkpoint: store.Checkpoint,
    out: Path,
    run_folder: Path,
    dtype: str | None,
    warn: Warn,
    abandoned: Callable[[], bool] = lambda: False,
) -> str:
    """Writes a checkpoint as a Hugging Face folder: all of it, or nothing.

    Args:
        checkpoint: a committed step of any layout, or an imported model.
        out: the folder, as `exporting` takes it.
        run_folder: of the run.
        dtype: of the weights, as torch names it; None: that of the imported model, else float32.
        warn: told what the export lacks.
        abandoned: asked before each weight; True ends the export.

    Returns:
        The type of the weights.

    Raises:
        ValueError: the weights do not fit the architecture, or `out` holds something else.
        ConfigError: the run's tokenizer cannot be opened.
        OSError: a file cannot be read or written.
        Abandoned: as it was told.
    """
    manifest = checkpoint.manifest
    settings: Mapping[str, Any] = manifest.get("run", {})
    kept = imported.find(_run_folders(checkpoint, run_folder), manifest["model"])
    theirs = None if kept is None else huggingface.read_config(kept)
    length = settings.get("model", {}).get("seq_length")
    if length is None:
        if kept is None:
            warn(
                "the checkpoint has neither settings nor files of its import: "
                "max_position_embeddings is 2048, and no tokenizer is written"
            )
        length = 2048 if kept is None else huggingface.read_shape(kept).seq_length
    shape = ModelShape(**{"seq_length": length, **manifest["model"]})
    name = dtype or _dtype_of(theirs or {})
    reader = checkpoint.reader()
    weight = evaluated_weights(reader, manifest)

    def read(parameter: str) -> Tensor:
        if abandoned():
            raise Abandoned
        return weight(parameter)

    with exporting(out, run_folder, checkpoint.iteration) as folder:
        eod, changed = _write_tokenizer(settings.get("data"), kept, folder, warn)
        if theirs is not None and changed:
            theirs |= {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": None}
        huggingface.write_config(shape, folder, name, eod, theirs)
        shapes = {parameter: reader.shape(parameter) for parameter in reader.names()}
        huggingface.export_weights(read, shapes, shape, folder, getattr(torch, name))
    return name


class Exporter:
    """Exports each checkpoint it is given into huggingface/ of the run's folder; one at a time.

    A thread of low priority does the work. While it is busy, only the newest checkpoint waits. A
    failure is a warning: a run never ends by its exports. For the rank that commits checkpoints.

    Args:
        run: the configuration.
        warn: told of every export that is skipped or fails.
    """

    def __init__(self, run: RunConfig, warn: Warn) -> None:
        self._run, self._warn = run, warn
        self._root = run.run_folder / EXPORTS
        self._lock = threading.Lock()
        self._current: Path | None = None
        self._waiting: Path | None = None
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        remove_unfinished(self._root)

    @property
    def needed(self) -> tuple[Path, ...]:
        """Checkpoints that are still to be read: retention removes them later."""
        with self._lock:
            return tuple(path for path in (self._current, self._waiting) if path is not None)

    def start(self, checkpoint: Path) -> None:
        """Exports a committed checkpoint, now or after the present one; returns at once."""
        with self._lock:
            skipped, self._waiting = self._waiting, checkpoint
            if skipped is not None:
                self._warn(
                    f"the export of {skipped.name} is skipped: {checkpoint.name} is newer, and "
                    "exports take longer than the steps between two saves"
                )
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="export", daemon=True)
                self._thread.start()

    def close(self, limit_s: float | None = None, tick: Callable[[], None] = lambda: None) -> None:
        """Waits until everything is exported; after `limit_s` seconds the rest is given up.

        Args:
            limit_s: None waits without a limit.
            tick: called once a second meanwhile.
        """
        with self._lock:
            thread = self._thread
        began = time.monotonic()
        while thread is not None and thread.is_alive():
            thread.join(min(1.0, limit_s) if limit_s is not None else 1.0)
            tick()
            if limit_s is not None and time.monotonic() - began >= limit_s:
                self._abandoned.set()

    def _work(self) -> None:
        """Takes the waiting checkpoint, again and again, until none waits."""
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._lock:
                self._current, self._waiting = self._waiting, None
                if self._current is None:
                    self._thread = None
                    return
                checkpoint = self._current
            try:
                self._export(checkpoint)
            except Abandoned:
                self._warn(f"the export of {checkpoint.name} is given up: the run ends")
            except Exception as error:  # whatever it is, the run goes on
                self._warn(f"{checkpoint.name} is not exported: {type(error).__name__}: {error}")

    def _export(self, folder: Path) -> None:
        found = [one for one in store.committed(folder.parent) if one.folder == folder]
        if not found:
            raise FileNotFoundError(f"{folder} is no longer there (KEEP_LAST)")
        export_checkpoint(
            found[0],
            self._root / folder.name,
            self._run.run_folder,
            DTYPES[self._run.train.dtype],
            self._warn,
            self._abandoned.is_set,
        )


def _dtype_of(config: Mapping[str, Any]) -> str:
    """The type of an imported model's weights, in either spelling; float32 where it says none."""
    name = str(config.get("dtype") or config.get("torch_dtype"))
    return name if name in DTYPES.values() else "float32"


def _run_folders(checkpoint: store.Checkpoint, run_folder: Path) -> list[Path]:
    """Where what came with the imported model may lie: this run, or the one it was LOADed from."""
    folders = [run_folder, checkpoint.folder.parent.parent]
    load = checkpoint.manifest.get("run", {}).get("checkpoint", {}).get("load")
    return [*folders, Path(load).parent, Path(load)] if load else folders


def evaluated_weights(reader: TensorReader, manifest: Mapping[str, Any]) -> Callable[[str], Tensor]:
    """Name -> the weight that the model is evaluated with."""

    def read(name: str) -> Tensor:
        weight = reader.whole(name)
        if manifest["optimizer"] == "adamwschedulefree" and "z" in reader.states(name):
            beta1 = manifest["run"]["optimizer"]["adam_beta1"]
            return evaluation_weight(weight, reader.whole(name, "z"), beta1)
        return weight

    return read


def _write_tokenizer(
    data: Mapping[str, Any] | None, kept: Path | None, out: Path, warn: Warn
) -> tuple[int | None, bool]:
    """Writes the tokenizer's files.

    Args:
        data: the run's section `data`; None for a model that was not trained here.
        kept: what came with the imported model.
        out: the export.
        warn: told where the run's tokenizer takes the place of the imported one.

    Returns:
        The id that ends a document where it is known, and whether the tokenizer is another than
        that of the imported model.
    """
    if kept is not None:
        if data is None or _is_tokenizer_of(kept, data["tokenizer_type"], data["tokenizer_model"]):
            imported.restore(kept, out)
            if data is not None and not imported.tokenizer_files(kept):
                export_tokenizer(data["tokenizer_type"], data["tokenizer_model"], out)
            return None, False
        warn(
            f"the run was trained with TOKENIZER_TYPE={data['tokenizer_type']} TOKENIZER_MODEL="
            f"{data['tokenizer_model']}, not with the tokenizer in {kept}: the run's is exported, "
            "and generation_config.json is left out"
        )
    if data is None:
        return None, False
    return export_tokenizer(data["tokenizer_type"], data["tokenizer_model"], out), True


def _is_tokenizer_of(kept: Path, kind: str, model: str | None) -> bool:
    """Whether a run's tokenizer gives the ids of the imported one, as far as can be told."""
    names = [path.name for path in imported.tokenizer_files(kept)]
    try:
        if kind == "NullTokenizer" or (model and Path(model).resolve() == kept.resolve()):
            return True
        if "tokenizer.json" in names:
            theirs = build_tokenizer("HFTokenizer", str(kept))
        elif "tokenizer.model" in names:
            theirs = build_tokenizer("SentencePieceTokenizer", str(kept / "tokenizer.model"))
        else:
            return True
        return theirs.encode(_PROBE) == build_tokenizer(kind, model).encode(_PROBE)
    except ConfigError:
        return True
