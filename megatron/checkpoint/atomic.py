"""Files that readers see complete or not at all: written under another name, then renamed."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"


def partial_prefix(name: str) -> str:
    """Prefix of the unfinished files of `name` that processes of this machine write."""
    return f".{name}.{platform.node()}-"


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[Any]]:
    """A new binary file that takes the place of `path` when the block ends without an error.

    Args:
        path: the file; its folder exists. What is there stays until the new one is complete.
        durable: flush it to disk first, so that a power cut leaves the old file or the new.

    Raises:
        OSError: it cannot be written; the old file stays and nothing else is left.
    """
    # Unique to machine, process and thread: others may write the same file at the same time.
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f"{partial_prefix(path.name)}{writer}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a whole file; arguments and errors as `replacing`, text as UTF-8."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)
