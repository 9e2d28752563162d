"""Lock files: held by one process at a time, freed by the system when their holder dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool | None]:
    """Hold a lock file in the block.

    Args:
        path: the file; made where it is missing, and left there.
        wait: until the lock is free; else try once.

    Yields:
        True: held. False: another process holds it. None: the file system has no locks, so work
        may be done twice.

    Raises:
        OSError: the file cannot be made.
    """
    # The library's substitute, a file that exists while the lock is held, would outlive its holder.
    lock = FileLock(path, blocking=wait, fallback_to_soft=False)
    held: bool | None = True
    try:
        lock.acquire()
    except Timeout:
        held = False
    except (OSError, NotImplementedError):
        if not path.exists():
            raise
        held = None
    try:
        yield held
    finally:
        lock.release()
