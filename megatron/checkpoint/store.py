"""A folder of checkpoints: committed all at once, listed, verified, chosen.

A step is written into `step-<iteration>.tmp`, made durable, described by a manifest with the size
and SHA-256 of every file, and renamed. What has no manifest under its final name was never
committed. A committed step is never written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

MANIFEST = "manifest.json"
FORMAT = 1


class SaveError(RuntimeError):
    """A checkpoint could not be written; older ones are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed step."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def iteration(self) -> int:
        """Steps done when it was saved."""
        return int(self.manifest["iteration"])

    def files(self, role: str) -> list[Path]:
        """Files of a role (`tensors`)."""
        files = self.manifest["files"]
        return [self.folder / name for name, about in files.items() if about["role"] == role]


def step_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{iteration:08d}"


def save(
    root: Path,
    iteration: int,
    write: Callable[[Path], None],
    about: dict[str, Any],
) -> Path:
    """Commits a step; called by all ranks.

    Args:
        root: folder of checkpoints, shared by all ranks.
        iteration: steps done.
        write: writes this rank's tensors to the path given.
        about: what else the manifest holds; must be JSON.

    Returns:
        The committed folder.

    Raises:
        SaveError: a rank could not write; said by all ranks alike, nothing is left behind.
    """
    final = step_folder(root, iteration)
    temporary = final.with_suffix(".tmp")
    rank, world = _place()

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

    _all_ranks(prepare if rank == 0 else _nothing, iteration)
    try:
        shares = _all_ranks(write_own, iteration)
    except SaveError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise

    def commit() -> None:
        files = {name: about for share in shares for name, about in share.items()}
        manifest = {"format": FORMAT, "iteration": iteration, **about, "files": files}
        _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1))
        _flush(temporary)
        os.rename(temporary, final)
        _flush(root)
        _write_durably(root / "latest", final.name)
        _write_durably(root / "latest_checkpointed_iteration.txt", str(iteration))

    _all_ranks(commit if rank == 0 else _nothing, iteration)
    return final


def committed(root: Path) -> list[Checkpoint]:
    """All committed steps, the newest first."""
    found = []
    for path in root.glob(f"step-*/{MANIFEST}"):
        if path.parent.suffix == ".tmp":
            continue
        try:
            manifest = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # a torn manifest: the step was never committed, or its disk is ill
        found.append(Checkpoint(path.parent, manifest))
    return sorted(found, key=lambda checkpoint: checkpoint.iteration, reverse=True)


def damage(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a step's files: one line each, empty where all is well.

    Args:
        checkpoint: the step.
        names: files to look at; default all.
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
                f"{path} has {path.stat().st_size} bytes, was written with {about['bytes']}"
            )
        elif _sha256(path) != about["sha256"]:
            lines.append(f"{path} differs from what was written (SHA-256)")
    return lines


def newest_sound(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest step whose files are as they were written; called by all ranks.

    Ranks share the hashing. A damaged step is named and the one before it tried.
    """
    rank, world = _place()
    candidates = _gather(committed(root) if rank == 0 else [])[0]
    for checkpoint in candidates:
        mine = sorted(checkpoint.manifest["files"])[rank::world]
        lines = [line for share in _gather(damage(checkpoint, mine)) for line in share]
        if not lines:
            return checkpoint
        for line in lines:
            warn(f"checkpoint {checkpoint.folder.name} is not usable: {line}")
    return None


def _all_ranks(action: Callable[[], Any], iteration: int) -> list[Any]:
    """Does something on every rank; where one fails, all raise the same SaveError."""
    result, error = None, None
    try:
        result = action()
    except OSError as exception:
        error = f"rank {_place()[0]}: {exception}"
    answers = _gather((result, error))
    errors = [error for _, error in answers if error]
    if errors:
        raise SaveError(f"step {iteration} was not saved: " + "; ".join(errors[:4]))
    return [result for result, _ in answers]


def _nothing() -> None:
    return None


def _place() -> tuple[int, int]:
    """(rank, world size); a tool without process group is a world of one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values = [value] * _place()[1]
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


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
