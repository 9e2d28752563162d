"""What comes with an imported Hugging Face model beside its weights, kept in the run's folder.

Its tokenizer, config.json and generation_config.json go into every export of the run again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.huggingface import CONFIG, read_shape
from megatron.config.shape import ModelShape

FOLDER = "huggingface-import"
"""In a run's folder."""

GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
)
"""Names and patterns of a tokenizer's files."""


def keep(folder: Path, run: Path) -> Path:
    """Copies what comes with a model into a run's folder, all or nothing; returns the copy.

    Args:
        folder: of the Hugging Face model.
        run: the run's folder; what an earlier import left there is replaced.
    """
    kept = run / FOLDER
    temporary = run / f"{FOLDER}.tmp-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        for path in (folder / CONFIG, *_present(folder, (GENERATION, *TOKENIZER))):
            shutil.copyfile(path, temporary / path.name)
        shutil.rmtree(kept, ignore_errors=True)
        temporary.rename(kept)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return kept


def find(folders: Iterable[Path], model: Mapping[str, Any]) -> Path | None:
    """What came with the model that a checkpoint began with, as a rule the copy that `keep` left.

    None where there is nothing.

    Args:
        folders: runs' folders to look into, or folders of Hugging Face models, in this order.
        model: the identity of the checkpoint's model.
    """
    wanted = ModelShape(**model).identity()
    for kept in (path for folder in folders for path in (folder / FOLDER, folder)):
        if (kept / CONFIG).is_file() and read_shape(kept).identity() == wanted:
            return kept
    return None


def tokenizer_files(kept: Path) -> list[Path]:
    """The tokenizer's files of a copy."""
    return _present(kept, TOKENIZER)


def restore(kept: Path, out: Path) -> None:
    """Copies tokenizer and generation settings into an export."""
    for path in _present(kept, (GENERATION, *TOKENIZER)):
        shutil.copyfile(path, out / path.name)


def _present(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
