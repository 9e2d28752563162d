"""manifest.json: what a checkpoint is and which files it has, guarded by a digest of itself.

The digest, SHA-256 of the file with zeros in its place, stands first, so that any other byte
counts. Format 1, written before, has none: there only keys, types and the step are checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.state import RunState

MANIFEST = "manifest.json"
FORMAT = 2

TENSORS, DATA, PIECES = "tensors", "data", "pieces"
"""Roles of a checkpoint's files: tensors of a rank, the record of the data, the piece index."""

_HEAD = b'{\n "sha256": "'
_ZEROS = b"0" * 64
_HEX = re.compile(r"[0-9a-f]{64}")
_NUMBERS = (int, float)
_KINDS: Mapping[str, tuple[type, ...]] = {
    "state": (dict,),
    "model": (dict,),
    "optimizer": (str, type(None)),
    "layout": (str,),
    "run": (dict,),
    "files": (dict,),
}


class DamageError(ValueError):
    """A checkpoint is not as it was written; the message names the path and the reason."""


def seal(content: Mapping[str, Any]) -> bytes:
    """The file of a manifest, its digest included."""
    zeros = _ZEROS.decode()
    text = json.dumps({"sha256": zeros, **content}, indent=1).encode()
    assert text.startswith(_HEAD + _ZEROS)
    return text.replace(_ZEROS, hashlib.sha256(text).hexdigest().encode(), 1)


def read_manifest(folder: Path, iteration: int) -> dict[str, Any]:
    """The checked manifest of a step.

    Args:
        folder: of the step.
        iteration: the step that the folder's name gives.

    Raises:
        DamageError: there is none, or it is not as it was written.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DamageError(f"{folder} is not a folder")
    if not path.is_file():
        raise DamageError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path} is not JSON: {error}") from None
    reason = problem(content, iteration) if isinstance(content, dict) else "is no JSON object"
    if reason is None and "sha256" in content:
        own = text[len(_HEAD) : len(_HEAD) + 64]
        blank = text[: len(_HEAD)] + _ZEROS + text[len(_HEAD) + 64 :]
        if not text.startswith(_HEAD) or hashlib.sha256(blank).hexdigest().encode() != own:
            reason = "differs from what was written (its own SHA-256)"
    if reason is not None:
        raise DamageError(f"{path} {reason}")
    return dict(content)


def problem(content: Mapping[str, Any], iteration: int) -> str | None:
    """What is wrong with a manifest's keys, types or step; None where nothing is."""
    return next(_problems(content, iteration), None)


def _problems(content: Mapping[str, Any], iteration: int) -> Iterator[str]:
    number, step = content.get("format"), content.get("iteration")
    if type(number) is not int or not 1 <= number <= FORMAT:
        yield f"has format={number!r}; this version reads 1 to {FORMAT}"
        return
    if number > 1 and "sha256" not in content:
        yield "has no digest of itself"
    if type(step) is not int or step != iteration:
        yield f"has iteration={step!r}, but the folder is of step {iteration}"
    for key, kinds in _KINDS.items():
        if key not in content or not isinstance(content[key], kinds):
            yield f"has no valid {key!r}"
            return
    if content["optimizer"] is not None:  # weights alone have no counters
        for key in ("counters", "loss_scaler"):
            values = content.get(key)
            if not isinstance(values, dict) or not all(
                isinstance(value, _NUMBERS) for value in values.values()
            ):
                yield f"has no valid {key!r}"
    if not isinstance(content.get("validation_loss"), (*_NUMBERS, type(None))):
        yield "has no valid 'validation_loss'"
    try:
        state = content["state"] if number == 1 else {**content["state"], "data": []}
        if RunState.from_dict(state).iteration != iteration:
            yield f"has state.iteration={state['iteration']}, but is of step {iteration}"
    except ValueError as error:
        yield f"is damaged: {error}"
    yield from _file_problems(content["files"], number)


def _file_problems(files: Mapping[str, Any], number: int) -> Iterator[str]:
    for name, about in files.items():
        if not (
            name
            and Path(name).name == name
            and isinstance(about, dict)
            and isinstance(about.get("role"), str)
            and type(about.get("bytes")) is int
            and isinstance(about.get("sha256"), str)
            and _HEX.fullmatch(about["sha256"])
        ):
            yield f"has no valid entry of the file {name!r}"
            return
    roles = [about["role"] for about in files.values()]
    if TENSORS not in roles:
        yield "names no file of tensors"
    for role in (DATA, PIECES):
        if number > 1 and roles.count(role) != 1:
            yield f"names {roles.count(role)} files of role {role!r} instead of 1"
