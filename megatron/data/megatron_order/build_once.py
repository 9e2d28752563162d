"""Files built once by many processes at the same time, on one machine or on a shared file system.

A process that finds a file missing or damaged takes its lock, checks again, builds it under a
temporary name and renames it. Where another process holds the lock, it builds other files first.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron.checkpoint.atomic import PARTIAL, partial_prefix, replacing
from megatron.config.errors import ConfigError
from megatron.data.file_lock import locked
from megatron.data.megatron_order.array_file import ArrayFile, Damaged, read_arrays

Log = Callable[[str], None]

# Files up to the first size have their arrays checked at start, up to the second before they are
# read (some tens of milliseconds); of larger files only header and size are checked.
CHECKED_AT_START = 1 << 18
CHECKED_AT_OPENING = 1 << 25
SUFFIX = ".safetensors"
_PAUSE_S = 0.05
_LOG_AFTER_S = 60.0


@dataclass(frozen=True)
class CacheFile:
    """A file that can be built.

    Attributes:
        folder: where it lies.
        kind: first word of its name.
        key: what it is made from, as text; its name holds a hash of it.
        title: what it is, for messages.
        build: writes it whole into an open file.
    """

    folder: Path
    kind: str
    key: str
    title: str
    build: Callable[[IO[bytes]], None]

    @property
    def path(self) -> Path:
        """`<folder>/<kind>-<hash of the key>.safetensors`."""
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:24]
        return self.folder / f"{self.kind}-{digest}{SUFFIX}"

    def open(self, log: Log) -> ArrayFile:
        """The file, rebuilt where it is missing or damaged."""
        try:
            return read_arrays(self.path, self.key, CHECKED_AT_OPENING)
        except Damaged:
            build_missing([self], log, CHECKED_AT_OPENING)
            return read_arrays(self.path, self.key, CHECKED_AT_OPENING)

    def problem(self, check_up_to: int) -> str | None:
        """Why it must be built; None if it is sound. `check_up_to` as in `read_arrays`."""
        try:
            read_arrays(self.path, self.key, check_up_to)
        except Damaged as damage:
            return str(damage)
        return None


def build_missing(
    files: Sequence[CacheFile], log: Log, check_up_to: int = CHECKED_AT_START
) -> None:
    """Build files until every one is complete; processes that call this divide the work.

    Args:
        files: in the order in which to build them; those that take longest first.
        log: called with lines about what is built, was damaged or is waited for.
        check_up_to: as in `read_arrays`.

    Raises:
        ConfigError: the folder cannot be written.
        DataError: from a `build`.
    """
    missing = {file.path: file for file in files if file.problem(check_up_to)}
    if not missing:
        return
    folder, started = files[0].folder, time.monotonic()
    log(f"{len(missing)} of {len(files)} files of the sample order are not in {folder}: building")
    if old := len(list(folder.glob("*.order"))):
        log(f"{folder} holds {old} *.order files of an earlier version; they can be removed")
    try:
        lock_path(files[0].path).parent.mkdir(parents=True, exist_ok=True)
        built = _build_all(missing, log, check_up_to)
        _remove_leftovers(folder)
    except OSError as error:
        raise ConfigError(
            f"the sample order cannot be written to {folder} ({error}): set DATA_CACHE_PATH to a "
            "folder that can be written and has room"
        ) from error
    log(f"built {built} files of the sample order in {time.monotonic() - started:.1f} s")


def lock_path(path: Path) -> Path:
    """The lock file of a cached file."""
    return path.parent / "locks" / f"{path.name}.lock"


def _build_all(missing: dict[Path, CacheFile], log: Log, check_up_to: int) -> int:
    """Build, or wait for, all of `missing`; returns how many this process built."""
    built, waiting_since = 0, time.monotonic()
    while missing:
        before = len(missing)
        for path, file in list(missing.items()):
            with locked(lock_path(path), wait=False) as held:
                if held is False:
                    continue
                problem = file.problem(check_up_to)  # unless another process was faster
                if problem:
                    if path.exists():
                        log(f"{path} ({file.title}) is rebuilt: {problem}")
                    with replacing(path) as stream:
                        file.build(stream)
                    built += 1
            del missing[path]
        if len(missing) < before:
            waiting_since = time.monotonic()
            continue
        time.sleep(_PAUSE_S)
        if time.monotonic() - waiting_since > _LOG_AFTER_S:
            waiting_since = time.monotonic()
            first = next(iter(missing.values()))
            log(f"waiting for another process to build {len(missing)} files, first {first.title}")
    return built


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes of this machine that died."""
    for entry in os.scandir(folder):
        target = entry.name[1:].partition(SUFFIX)[0] + SUFFIX
        if not (entry.name.startswith(partial_prefix(target)) and entry.name.endswith(PARTIAL)):
            continue
        with locked(lock_path(folder / target), wait=False) as held:
            if held:  # only a holder of the lock writes, so nobody does
                Path(entry.path).unlink(missing_ok=True)
