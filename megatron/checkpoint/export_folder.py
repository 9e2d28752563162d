"""The folder of an export: complete under its name or not there, and never over other files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically

NOTE = "export.json"
"""In each export: the run that it was made of, and the files that were written."""

UNFINISHED = ".tmp-"


@contextmanager
def exporting(out: Path, run: Path, step: int) -> Iterator[Path]:
    """A new folder that gets the name `out` when the block ends without an error.

    Args:
        out: the export. It may be missing, empty, or an earlier export of the same run.
        run: the run's folder.
        step: that is exported.

    Raises:
        ValueError: `out` holds something else; it stays as it is.
        OSError: it cannot be written; what was there stays.
    """
    owner = str(run.resolve())
    _require_ours(out, owner)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}{UNFINISHED}{os.getpid()}")
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a dead process with this number
        temporary.mkdir()
        yield temporary
        names = sorted(path.name for path in temporary.iterdir())
        note = {"run": owner, "step": step, "files": names}
        write_atomically(temporary / NOTE, json.dumps(note, indent=1))
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what exports of dead processes left in a folder of exports."""
    for path in folder.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _require_ours(out: Path, owner: str) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        note = json.loads((out / NOTE).read_text())
        run, files = note["run"], set(note["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} exists and is no export of this run; name an empty or a new folder"
        ) from None
    if run != owner:
        raise ValueError(f"{out} is an export of {run}, not of {owner}; name another folder")
    added = sorted(path.name for path in out.iterdir() if path.name not in files | {NOTE})
    if added:
        raise ValueError(
            f"{out} is an earlier export of this run, but {', '.join(added)} came later and would "
            "be lost; name another folder, or move them away"
        )
