"""A folder of checkpoints: which steps it has, which of them are sound, and what is set aside.

A step is `step-<iteration>`, committed by one rename (saver.py). Whatever stands under such a name
and is not as it was written is damage: named, passed over, moved aside, never deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.atomic import write_atomically
from megatron.checkpoint.manifest import DATA, PIECES, TENSORS, DamageError, read_manifest
from megatron.checkpoint.piece_index import PieceIndex
from megatron.checkpoint.state import RunState
from megatron.checkpoint.tensors import TensorReader
from megatron.parallel.control import Control

DAMAGED = "damaged"

_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A committed step.

    Attributes:
        folder: of its files.
        manifest: checked.
        records: contents of its data record and piece index by role, checked; none in format 1,
            which keeps the one in the manifest and the other in the headers.
    """

    folder: Path
    manifest: Mapping[str, Any]
    records: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        """Number of its last step."""
        return int(self.manifest["iteration"])

    def files(self, role: str) -> list[Path]:
        """Its files of a role, such as `tensors`."""
        return [self.folder / name for name in _names(self.manifest, role)]

    def state(self) -> RunState:
        """Where the run stood."""
        values = dict(self.manifest["state"])
        if DATA in self.records:
            values["data"] = json.loads(self.records[DATA])
        return RunState.from_dict(values)

    def reader(self) -> TensorReader:
        """Its tensors, for any layout."""
        index = None
        if PIECES in self.records:
            index = PieceIndex.from_dict(json.loads(self.records[PIECES]))
        return TensorReader(self.files(TENSORS), index)


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        checkpoint: the newest sound step.
        damaged: what is wrong with newer ones, or with all where none is sound; a line for each
            damaged file.
    """

    checkpoint: Checkpoint | None
    damaged: tuple[str, ...]


def step_folder(root: Path, iteration: int) -> Path:
    """Folder of a committed step."""
    return root / f"step-{iteration:08d}"


def steps(root: Path) -> list[int]:
    """The steps that have a folder, sound or not, the newest first.

    Raises:
        OSError: the folder is there and cannot be listed.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = [int(match[1]) for match in map(_STEP.fullmatch, names) if match]
    return sorted((n for n in numbers if step_folder(root, n).name in names), reverse=True)


def open_step(root: Path, iteration: int) -> Checkpoint:
    """A step with its small files, which are checked; those of tensors are not.

    Raises:
        DamageError: it is not as it was written.
        OSError: it cannot be read.
    """
    folder = step_folder(root, iteration)
    manifest = read_manifest(folder, iteration)
    records = {}
    for role in (DATA, PIECES):
        for name in _names(manifest, role):
            records[role] = _read_record(folder / name, manifest["files"][name])
    return Checkpoint(folder, manifest, records)


def committed(root: Path, warn: Callable[[str], None] = lambda line: None) -> list[Checkpoint]:
    """All steps whose manifest is sound, the newest first; the others are named to `warn`."""
    found = []
    for iteration in steps(root):
        try:
            found.append(open_step(root, iteration))
        except (DamageError, OSError) as error:
            warn(f"checkpoint {step_folder(root, iteration).name} is not usable: {error}")
    return found


def damage(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a step's files: one line per damaged file.

    Args:
        checkpoint: the step.
        names: files to verify; default all.
    """
    files = checkpoint.manifest["files"]
    lines = [
        _file_damage(checkpoint.folder / name, files[name])
        for name in (files if names is None else names)
    ]
    return [line for line in lines if line]


def newest_sound(
    root: Path,
    control: Control,
    warn: Callable[[str], None],
    *,
    set_aside: bool,
    until: int | None = None,
) -> Found:
    """The newest step that is as it was written; a collective.

    Rank 0 reads one manifest at a time for all; each rank hashes its share of the tensors' files.
    A damaged step is named in warnings. Nothing is moved where no step is sound: a file system
    that fails must not scatter what it holds.

    Args:
        root: folder of checkpoints.
        control: all ranks.
        warn: called with each line, on every rank.
        set_aside: move damaged steps that are newer than the sound one, so that they can be saved
            again; False in the folder of another run.
        until: no later step is looked at.
    """
    candidates, lines = control.broadcast(_listed(root) if control.rank == 0 else None)
    damaged: list[str] = list(lines)
    passed: list[int] = []
    sound: Checkpoint | None = None
    for iteration in candidates:
        if until is not None and iteration > until:
            continue
        name = step_folder(root, iteration).name
        found, error = control.broadcast(_opened(root, iteration) if control.rank == 0 else None)
        wrong = [error] if found is None else _shared_damage(found, control)
        if not wrong:
            sound = found
            break
        passed.append(iteration)
        damaged += [f"checkpoint {name} is not usable: {line}" for line in wrong]
    for line in damaged:
        warn(line)
    if sound is not None and set_aside and passed:
        moved = [_moved(root, one) for one in passed] if control.rank == 0 else None
        for line in control.broadcast(moved):
            warn(line)
    return Found(sound, tuple(damaged))


def move_aside(folder: Path, why: str = DAMAGED) -> Path:
    """Moves a step to `step-N.<why>-<UTC time>`, where nothing looks for a step.

    Raises:
        OSError: it cannot be moved.
    """
    base = f"{folder.name}.{why}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    names = (f"{base}{f'-{n}' if n else ''}" for n in range(1000))
    target = next(path for path in map(folder.with_name, names) if not path.exists())
    os.rename(folder, target)
    return target


def set_aside_after(root: Path, iteration: int) -> list[Path]:
    """Moves the steps after `iteration`, where the run rolls back to, to `step-N.rolled-back-...`.

    Returns:
        Their new folders, the newest first.

    Raises:
        OSError: one cannot be moved; newer ones are.
    """
    later = [step_folder(root, step) for step in steps(root) if step > iteration]
    moved = [move_aside(folder, "rolled-back") for folder in later]
    write_atomically(root / "latest", step_folder(root, iteration).name)
    write_atomically(root / "latest_checkpointed_iteration.txt", str(iteration))
    return moved


def _moved(root: Path, iteration: int) -> str:
    folder = step_folder(root, iteration)
    try:
        return f"checkpoint {folder.name} is set aside as {move_aside(folder).name}"
    except OSError as error:
        return (
            f"checkpoint {folder.name} could not be set aside ({error}): step {iteration} cannot"
            " be saved again before it is moved"
        )


def _listed(root: Path) -> tuple[list[int], list[str]]:
    """Steps to look at, and what was damaged before where there is nothing else."""
    try:
        found = steps(root)
        aside = sorted(root.glob(f"step-*.{DAMAGED}-*")) if not found else []
    except OSError as error:
        return [], [f"{root} cannot be listed: {error}"]
    return found, [f"{path} was set aside as damaged, and no sound step is left" for path in aside]


def _opened(root: Path, iteration: int) -> tuple[Checkpoint | None, str]:
    """A step, or what is wrong with it."""
    try:
        return open_step(root, iteration), ""
    except (DamageError, OSError) as error:
        return None, str(error)


def _shared_damage(checkpoint: Checkpoint, control: Control) -> list[str]:
    """What any rank finds wrong with its share of the tensors' files; the same on all ranks."""
    names = sorted(_names(checkpoint.manifest, TENSORS))[control.rank :: control.size]
    return [line for lines in control.all_gather(damage(checkpoint, names)) for line in lines]


def _names(manifest: Mapping[str, Any], role: str) -> list[str]:
    return [name for name, about in manifest["files"].items() if about["role"] == role]


def _read_record(path: Path, about: Mapping[str, Any]) -> bytes:
    if not path.is_file():
        raise DamageError(f"{path} is missing")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise DamageError(f"{path} differs from what was written (SHA-256)")
    return content


def _file_damage(path: Path, about: Mapping[str, Any]) -> str:
    """What is wrong with a file, empty where nothing is."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != about["bytes"]:
            return f"{path} has {size} bytes, but {about['bytes']} were written"
        if _sha256(path) != about["sha256"]:
            return f"{path} differs from what was written (SHA-256)"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
