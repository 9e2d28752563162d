"""Checkpoints for tests: small ones, with all that a manifest must have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.retention import KEEP_ALL, Retention
from megatron.checkpoint.saver import Saved, Saver
from megatron.checkpoint.state import RunState
from megatron.parallel.control import ALONE, Control
from megatron.parallel.piece import WEIGHT, Piece

STAGE = {"iteration": 0, "samples": 0, "tokens": 0, "record": {"seed": 1}, "drawn": {}}
FILE = "rank-00000-of-00001.safetensors"
FILES = sorted([FILE, "data.json", "manifest.json", "pieces.json"])


def about(iteration: int, **more: Any) -> dict[str, Any]:
    """The entries of a manifest."""
    state = RunState(iteration=iteration, consumed_samples=8 * iteration).to_dict()
    del state["data"]
    return {
        "state": state,
        "model": {"num_layers": 2},
        "optimizer": "adamw",
        "layout": "tp1 pp1 dp1",
        "run": {},
        "counters": {},
        "loss_scaler": {},
        **more,
    }


def pieces(iteration: int, rank: int = 0, world: int = 1, length: int = 8) -> list[Piece]:
    """A rank's run of a parameter of `world * length` elements, with a state of its optimizer."""
    weight = torch.arange(length, dtype=torch.float32) + iteration + 100 * rank
    tensors = {WEIGHT: weight, "exp_avg": weight * 10}
    return [Piece("w", (world * length,), None, 0, 1, rank * length, tensors, {"step": 3.0})]


def make_saver(
    root: Path,
    control: Control = ALONE,
    *,
    behind: bool = False,
    retention: Retention = KEEP_ALL,
    warn: Callable[[str], None] = print,
) -> Saver:
    """A saver; `behind` saves asynchronously."""
    return Saver(root, control, retention, asynchronous=behind, warn=warn)


def save(
    saver: Saver, iteration: int, own: list[Piece] | None = None, control: Control = ALONE
) -> Saved:
    """A save, waited for."""
    own = pieces(iteration, control.rank, control.size) if own is None else own
    saved = saver.save(iteration, own, about(iteration), [STAGE]) or saver.wait()
    assert saved is not None
    return saved


def saved(root: Path, *iterations: int) -> Path:
    """A folder with these steps."""
    for iteration in iterations:
        assert save(make_saver(root), iteration).path is not None
    return root


def files_below(root: Path) -> list[str]:
    """Every file in a folder."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def folders(root: Path) -> list[str]:
    """The folders in a folder."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())
