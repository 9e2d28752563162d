"""What a folder without our checkpoints looks like, by the names in it, and what to do with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

IMPORT = "python3 tools/convert_hf.py import"
"""The command that makes a foreign checkpoint the first one of a run."""


@dataclass(frozen=True)
class Kind:
    """A format that others write.

    Attributes:
        name: for messages.
        patterns: names, one of which is there.
        advice: what to do; {folder} stands for the path.
    """

    name: str
    patterns: tuple[str, ...]
    advice: str


_IMPORTED = f"make it the first checkpoint of a run: {IMPORT} {{folder}} RUN"
_BY_HUGGING_FACE = (
    "export it there as a Hugging Face folder, then: " + IMPORT + " HUGGING_FACE_FOLDER RUN"
)
REFERENCE = Kind(
    "checkpoints of Megatron-DeepSpeed",
    (
        "global_step*", "mp_rank_*_model_states.pt", "layer_*-model_*-model_states.pt",
        "*zero_pp_rank_*_states.pt", "latest_universal",
    ),
    _IMPORTED,
)  # fmt: skip
HUGGING_FACE = Kind(
    "a Hugging Face model",
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model*.bin"),
    f"FINETUNE=1 starts from its weights; or {_IMPORTED}",
)
KINDS = (
    REFERENCE,
    HUGGING_FACE,
    Kind("Megatron-LM checkpoints", ("iter_*", "release", "model_optim_rng.pt"), _BY_HUGGING_FACE),
    Kind(
        "a distributed checkpoint of torch or Megatron-Core",
        (".metadata", "*/.metadata", "__*_*.distcp", "common.pt"),
        _BY_HUGGING_FACE,
    ),
    Kind("checkpoints of Lightning", ("*.ckpt",), _BY_HUGGING_FACE),
)
"""Formats by what their folders hold; the first that fits counts."""

SHOWN = 4


def kind_of(folder: Path) -> Kind | None:
    """The format of a folder; None where no known one fits, or it is not there."""
    for kind in KINDS:
        if any(next(folder.glob(pattern), None) is not None for pattern in kind.patterns):
            return kind
    return None


def contents(folder: Path) -> str:
    """What a folder without our checkpoints holds, in words, and what to do with it."""
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is a file: give the folder that holds the checkpoints"
    inner = folder / "checkpoints"
    if any(inner.glob("step-*")):
        return f"is a run's folder: its checkpoints are in {inner}"
    if (folder / "manifest.json").is_file():
        return f"is a single checkpoint: give the folder above it, {folder.parent}"
    kind = kind_of(folder)
    if kind is not None:
        return f"holds {kind.name}: {kind.advice.format(folder=folder)}"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "is empty"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"holds no checkpoint, but {', '.join(names[:SHOWN])}{more}"
