"""Files built once by many processes at the same time, on one machine or on a shared file system.

Who finds a file missing or damaged takes its lock, looks again, builds it under a temporary name
and renames it. Whoever finds the lock taken goes on with other files and comes back. The system
frees the lock of a process that dies, so nobody waits for the dead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron.config.errors import ConfigError
from megatron.data.megatron_order.array_file import (
    ArrayFile,
    Damaged,
    Header,
    map_arrays,
    read_header,
)

Log = Callable[[str], None]

# Arrays are held against their sums at start in files of up to the first size, and before they are
# read in files of up to the second: some tens of milliseconds. Of larger files, header and size.
CHECKED_AT_START = 1 << 18
CHECKED_AT_OPENING = 1 << 25
_PAUSE_S = 0.05
_SAY_AFTER_S = 60.0
_LOCKS = ".locks"
_PARTIAL = ".partial"
# A file system without locks: work may be done twice, renaming keeps the result whole.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_TAKEN = (errno.EACCES, errno.EAGAIN)


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
        """`<folder>/<kind>-<hash of the key>.order`."""
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:24]
        return self.folder / f"{self.kind}-{digest}.order"

    def header(self, check_up_to: int) -> Header:
        """Its header; `check_up_to` as in `read_header`.

        Raises:
            Damaged: it is missing or damaged.
        """
        return read_header(self.path, self.key, check_up_to)

    def problem(self, check_up_to: int) -> str | None:
        """Why it must be built, None where it need not."""
        try:
            self.header(check_up_to)
        except Damaged as damage:
            return str(damage)
        return None


def checked(file: CacheFile, log: Log) -> Header:
    """Header of a file that is about to be read, built again where it is missing or damaged."""
    try:
        return file.header(CHECKED_AT_OPENING)
    except Damaged:
        build_missing([file], log, CHECKED_AT_OPENING)
        return file.header(CHECKED_AT_OPENING)


def opened(file: CacheFile, log: Log) -> ArrayFile:
    """Map a file, building it again where it is missing or damaged."""
    return map_arrays(file.path, checked(file, log))


def build_missing(
    files: Sequence[CacheFile], log: Log, check_up_to: int = CHECKED_AT_START
) -> None:
    """Return when every file is there and whole; processes that call this share the work.

    Args:
        files: in the order in which to build them; those that take longest first.
        log: told what is built, what was damaged, and for what others are waited.
        check_up_to: as in `read_header`.

    Raises:
        ConfigError: the folder cannot be written.
        DataError: whatever a `build` finds wrong.
    """
    missing = {file.path: file for file in files if file.problem(check_up_to)}
    if not missing:
        return
    folder, started = files[0].folder, time.monotonic()
    log(f"{len(missing)} of {len(files)} files of the sample order are not in {folder}: building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _Locks(folder) as locks:
            built = _build_all(missing, locks, log, check_up_to)
            _remove_leftovers(folder, locks)
    except OSError as error:
        raise ConfigError(
            f"the sample order cannot be written to {folder} ({error}): set DATA_CACHE_PATH to a "
            "folder that can be written and has room"
        ) from error
    log(f"built {built} files of the sample order in {time.monotonic() - started:.1f} s")


def _build_all(missing: dict[Path, CacheFile], locks: _Locks, log: Log, check_up_to: int) -> int:
    """Build, or wait for, all of `missing`; returns how many this process built."""
    built = 0
    waiting_since = time.monotonic()
    while missing:
        before = len(missing)
        for path, file in list(missing.items()):
            with locks.attempt(path.name) as mine:
                if not mine:
                    continue
                problem = file.problem(check_up_to)
                if problem:
                    _build(file, problem, log)
                    built += 1
            del missing[path]
        if len(missing) < before:
            waiting_since = time.monotonic()
            continue
        time.sleep(_PAUSE_S)
        if time.monotonic() - waiting_since > _SAY_AFTER_S:
            waiting_since = time.monotonic()
            first = next(iter(missing.values()))
            log(f"waiting for another process to build {len(missing)} files, first {first.title}")
    return built


def _build(file: CacheFile, problem: str, log: Log) -> None:
    """Build one file under a temporary name, then give it its own."""
    if file.path.exists():
        log(f"{file.path} ({file.title}) is built again: {problem}")
    prefix = f".{file.path.name}.{platform.node()}-{os.getpid()}-"
    handle, name = tempfile.mkstemp(dir=file.folder, prefix=prefix, suffix=_PARTIAL)
    try:
        os.fchmod(handle, 0o644)  # mkstemp's 0600 would keep the file from the group
        with os.fdopen(handle, "wb") as stream:
            file.build(stream)
        os.replace(name, file.path)
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_leftovers(folder: Path, locks: _Locks) -> None:
    """Remove the unfinished files of processes of this machine that died."""
    for entry in os.scandir(folder):
        target, host, rest = entry.name[1:].partition(f".{platform.node()}-")
        if not (entry.name.startswith(".") and host and rest.endswith(_PARTIAL)):
            continue
        with locks.attempt(target) as mine:
            if mine and locks.work:  # only who holds the lock writes: nobody does
                Path(entry.path).unlink(missing_ok=True)


class _Locks:
    """Locks on single bytes of one file, one byte a name; names that share a byte only wait.

    Attributes:
        work: False once the file system has refused: then nothing is locked.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCKS
        self.work = True  # until the file system says otherwise

    def __enter__(self) -> _Locks:
        """Open the file; closing it, or the end of the process, frees every lock."""
        self._file = open(self._path, "ab")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[bool]:
        """Hold the lock of `name` in the block; False where another process holds it."""
        byte = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno not in (*_NO_LOCKS, *_TAKEN):
                raise
            self.work = error.errno in _TAKEN
            yield not self.work
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
