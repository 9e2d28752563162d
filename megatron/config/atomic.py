"""Files that a reader finds whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[Any]]:
    """A new binary file that takes the place of `path` when the block ends without an error.

    Args:
        path: the file; its folder exists. What is there stays until the new one is complete.
        durable: wait until the disk has it, so that a power cut leaves the old file or the new.

    Raises:
        OSError: it cannot be written; the old file stays and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
