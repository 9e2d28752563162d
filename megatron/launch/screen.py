"""What a run prints: to the screen, and at the end of a log file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType


class Screen:
    """Lines to the terminal and to a file; a terminal that is gone does not stop a run.

    Args:
        log: file to append to; None: none.
    """

    def __init__(self, log: Path | None = None) -> None:
        self._log = log.open("ab") if log else None

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._log:
            self._log.close()

    def line(self, line: bytes, is_error: bool = False) -> None:
        """One line with its end."""
        if self._log:
            self._log.write(line)
            self._log.flush()
        stream = sys.stderr if is_error else sys.stdout
        try:
            stream.buffer.write(line)
            stream.flush()
        except BrokenPipeError:
            # Python would otherwise try once more at its own end, and change the exit status.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def say(self, text: str, is_error: bool = False) -> None:
        """A text of our own."""
        self.line(f"{text}\n".encode(), is_error)
