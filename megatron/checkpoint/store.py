"""A folder of checkpoints: each step is committed by one rename, listed, verified and chosen.

A step is written into `step-<iteration>.tmp`, flushed to disk, described by a manifest with size
and SHA-256 of every file, then renamed. A folder without a manifest under its final name was never
committed. A committed step is never rewritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.checkpoint.atomic import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint could not be written; older ones are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed step."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def iteration(self) -> int:
        """Number of its last step."""
        return int(self.manifest["iteration"])

    def files(self, role: str) -> list[Path]:
        """Its files of a role, such as `tensors`."""
        files = self.manifest["files"]
        return [self.folder / name for name, about in files.items() if about["role"] == role]


def step_folder(root: Path, iteration: int) -> Path:
    """Folder of a committed step."""
    return root / f"step-{iteration:08d}"


def save(
    root: Path,
    iteration: int,
    write: Callable[[Path], None],
    about: dict[str, Any],
) -> Path:
    """Commits a step; a collective of all ranks.

    Args:
        root: folder of checkpoints, on a file system that all ranks share.
        iteration: number of the step.
        write: writes this rank's tensors to the given path.
        about: further entries of the manifest, JSON-ready.

    Returns:
        The committed folder.

    Raises:
        SaveError: a rank could not write; all ranks raise the same error, no file is left.
    """
    final = step_folder(root, iteration)
    temporary = final.with_suffix(".tmp")
    rank, world = _rank_and_world()

    def prepare() -> None:
        if final.exists():
            raise FileExistsError(f"{final} is already committed")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write_own() -> dict[str, Any]:
        path = temporary / f"rank-{rank:05d}-of-{world:05d}.safetensors"
        write(path)
        _flush(path)
        return {path.name: {"role": "tensors", **_describe(path)}}

    def commit(written: list[dict[str, Any]]) -> None:
        files = {name: about for own in written for name, about in own.items()}
        manifest = {"format": FORMAT, "iteration": iteration, **about, "files": files}
        write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
        _flush(temporary)
        os.rename(temporary, final)
        _flush(root)
        write_atomically(root / "latest", final.name)
        write_atomically(root / "latest_checkpointed_iteration.txt", str(iteration))

    _on_first_rank(prepare, iteration)
    try:
        written = _on_all_ranks(write_own, iteration)
        _on_first_rank(lambda: commit(written), iteration)
    except SaveError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def committed(root: Path) -> list[Checkpoint]:
    """All committed steps, the newest first."""
    found = []
    for path in root.glob(f"step-*/{MANIFEST}"):
        if path.parent.suffix:
            continue  # being written, or set aside
        try:
            manifest = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # truncated manifest: uncommitted step or failing disk
        found.append(Checkpoint(path.parent, manifest))
    return sorted(found, key=lambda checkpoint: checkpoint.iteration, reverse=True)


def damage(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a step's files: one line per damaged file.

    Args:
        checkpoint: the step.
        names: files to verify; default all.
    """
    lines = []
    for name, about in checkpoint.manifest["files"].items():
        if names is not None and name not in names:
            continue
        path = checkpoint.folder / name
        if not path.is_file():
            lines.append(f"{path} is missing")
        elif path.stat().st_size != about["bytes"]:
            lines.append(
                f"{path} has {path.stat().st_size} bytes, but {about['bytes']} were written"
            )
        elif _sha256(path) != about["sha256"]:
            lines.append(f"{path} differs from what was written (SHA-256)")
    return lines


def newest_sound(
    root: Path, warn: Callable[[str], None], *, until: int | None = None
) -> Checkpoint | None:
    """The newest step whose files are as they were written; a collective of all ranks.

    Each rank hashes some of the files. A damaged step is named in a warning and skipped.

    Args:
        root: of the run's checkpoints.
        warn: takes a line.
        until: no later step is looked at.
    """
    rank, world = _rank_and_world()
    candidates = _gather(committed(root) if rank == 0 else [])[0]
    for checkpoint in candidates:
        if until is not None and checkpoint.iteration > until:
            continue
        own = sorted(checkpoint.manifest["files"])[rank::world]
        lines = [line for found in _gather(damage(checkpoint, own)) for line in found]
        if not lines:
            return checkpoint
        for line in lines:
            warn(f"checkpoint {checkpoint.folder.name} is not usable: {line}")
    return None


def set_aside_after(root: Path, iteration: int, mark: str) -> list[Path]:
    """Renames the steps after `iteration` to `step-N.<mark>`, so that no start resumes from them.

    Returns:
        Their new folders, the newest first.
    """
    moved = []
    for checkpoint in committed(root):
        if checkpoint.iteration > iteration:
            moved.append(checkpoint.folder.rename(f"{checkpoint.folder}.{mark}"))
    write_atomically(root / "latest", step_folder(root, iteration).name)
    write_atomically(root / "latest_checkpointed_iteration.txt", str(iteration))
    _flush(root)
    return moved


def _on_all_ranks(action: Callable[[], T], iteration: int) -> list[T]:
    """Results of every rank's action, in rank order; where one fails, all raise one SaveError."""
    results, error = [], None
    try:
        results = [action()]
    except OSError as exception:
        error = f"rank {_rank_and_world()[0]}: {exception}"
    answers = _gather((results, error))
    errors = [error for _, error in answers if error]
    if errors:
        raise SaveError(f"step {iteration} was not saved: " + "; ".join(errors[:4]))
    return [result for results, _ in answers for result in results]


def _on_first_rank(action: Callable[[], None], iteration: int) -> None:
    """Rank 0's action; where it fails, all ranks raise the same SaveError."""
    rank, _ = _rank_and_world()
    _on_all_ranks(action if rank == 0 else lambda: None, iteration)


def _rank_and_world() -> tuple[int, int]:
    """(rank, world size); (0, 1) in a tool without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gather(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    values = [value] * _rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
