"""The lines of a run: to the terminal, and into its log file once there is a run.

Neither a terminal that is gone nor a file that cannot be written stops a run.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron.display.marked_line import unmarked
from megatron.display.run_view import RunView
from megatron.launch.heartbeat import Beat

RETRY_S = 5.0  # between attempts to write a file that could not be written
FOLD_S = 10.0  # ranks that fail alike get this long to say so in one line

_RANK_ERROR = re.compile(rb"\[rank (\d+)\] (error: .*)\n?")


class Screen:
    """Lines to the terminal and to a file; may be used by several threads.

    Args:
        log: file to append to; None: none.
        ready: whether the file may be written by now; lines wait in memory until it may.
        view: draws a short form of the lines on the terminal; None: they are printed as they are.
    """

    def __init__(
        self,
        log: Path | None = None,
        ready: Callable[[], bool] = lambda: True,
        view: RunView | None = None,
    ) -> None:
        self._log = _LogFile(log, self._show) if log else None
        self._ready = ready
        self._waiting: list[bytes] | None = []
        self._repeats = _Repeats()
        self._lock = threading.RLock()
        self._view = view

    def close(self) -> None:
        """Write what is left, and close the file."""
        with self._lock:
            self._add(self._repeats.rest(), True)
            self._write(b"")
            if self._log:
                self._log.close()
            if self._view:
                self._view.close()
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    _drop(stream)

    def keep(self) -> None:
        """Write the lines that wait, though the file is not ready: they tell why it never was."""
        self._ready = lambda: True

    def line(self, line: bytes, is_error: bool = False) -> None:
        """One line with its end, and perhaps the record that it was made from before it."""
        record, line = unmarked(line)
        with self._lock:
            self._add(self._repeats.fold(line, is_error), is_error, record)

    def turn(self, beat: Beat | None) -> None:
        """Draw where rank 0 is, as its last beat says it; called many times a second."""
        if self._view is None:
            return
        with self._lock:
            if beat is not None:
                self._view.entered(beat.phase, beat.step, beat.ticks, beat.total)
            try:
                self._view.turn()
            except OSError:  # the terminal has gone
                self._view = None

    def print(self, text: str, is_error: bool = False) -> None:
        """A text of our own."""
        self.line(f"{text}\n".encode(), is_error)

    def _add(self, lines: bytes, is_error: bool, record: Mapping[str, Any] | None = None) -> None:
        if lines:
            self._write(lines)
            self._show(lines, is_error, record)

    def _write(self, lines: bytes) -> None:
        """To the file, or to those that wait for it."""
        if self._log is None:
            return
        if self._waiting is not None:
            self._waiting.append(lines)
            if not self._ready():
                return
            lines, self._waiting = b"".join(self._waiting), None
        self._log.write(lines)

    def _show(self, lines: bytes, is_error: bool, record: Mapping[str, Any] | None = None) -> None:
        stream = sys.stderr if is_error else sys.stdout
        try:
            # A view takes them one by one: those that it does not draw keep their place.
            for line in [lines] if self._view is None else lines.splitlines(keepends=True):
                if self._view and not is_error and self._view.show(_text(line), record):
                    continue
                if self._view:
                    self._view.clear()
                stream.buffer.write(line)
                stream.flush()
        except BrokenPipeError:
            _drop(stream)
        except OSError:
            pass  # a file on a full disk, perhaps: the next line tries again


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r\n")


def _drop(stream: TextIO) -> None:
    """Write to nowhere: Python would try once more at its own end, and change the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _LogFile:
    """A file that is appended to; while the disk refuses, lines are counted, and later said lost.

    Args:
        path: the file.
        show: prints on the terminal alone.
    """

    def __init__(self, path: Path, show: Callable[[bytes, bool], None]) -> None:
        self._path, self._show = path, show
        self._file: int | None = None
        self._lost = self._written = 0
        self._lost_since = ""
        self._retry_at = 0.0
        self._torn = False

    def write(self, lines: bytes) -> None:
        """Append; an error is printed once."""
        if self._lost and time.monotonic() < self._retry_at:
            self._lost += lines.count(b"\n")
            return
        self._written = 0
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if self._lost:
                self._put(self._gap())
                self._lost = self._written = 0
            self._put(lines)
        except OSError as error:
            if not self._lost:
                self._lost_since = time.strftime("%Y-%m-%d %H:%M:%S")
                text = f"error: {self._path} cannot be written ({error.strerror}); the run goes on"
                self._show(f"{text}, and tries again every {RETRY_S:g} s\n".encode(), True)
            self._lost += max(1, lines[self._written :].count(b"\n"))
            self._retry_at = time.monotonic() + RETRY_S

    def close(self) -> None:
        """The last attempt, if lines are lost."""
        if self._lost:
            self._retry_at = 0.0
            self.write(b"")
        if self._file is not None:
            os.close(self._file)

    def _gap(self) -> bytes:
        """A line that says what is missing."""
        end = "\n" if self._torn else ""
        until = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"{end}[{self._lost} lines are missing here: not written from {self._lost_since}"
        return f"{text} to {until}]\n".encode()

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        while data:
            count = os.write(self._file, data)
            self._torn = data[count - 1 : count] != b"\n"
            self._written += count
            data = data[count:]


class _Repeats:
    """Lines of an error that several ranks print: the first is passed on, the others are counted.

    They look like `[rank 3] error: text`, on standard error.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, tuple[bytes, float]] = {}
        self._others: dict[bytes, set[int]] = {}

    def fold(self, line: bytes, is_error: bool) -> bytes:
        """What is to be shown for a line: nothing, the line, or a count before it."""
        match = _RANK_ERROR.fullmatch(line) if is_error else None
        now = time.monotonic()
        if match is None:
            return self.rest() + line
        rank, text = match[1], match[2]
        known = self._first.get(text)
        if known and known[0] != rank and now - known[1] < FOLD_S:
            self._others.setdefault(text, set()).add(int(rank))
            return b""
        self._first[text] = rank, now
        return line

    def rest(self) -> bytes:
        """The ranks counted since the last time, in a line; nothing where there are none."""
        groups = dict.fromkeys(tuple(sorted(ranks)) for ranks in self._others.values())
        self._others.clear()
        return b"".join(
            f"[the same on {len(ranks)} other rank{'s' * (len(ranks) > 1)}: "
            f"{_ranges(ranks)}]\n".encode()
            for ranks in groups
        )


def _ranges(numbers: tuple[int, ...]) -> str:
    """`1-3, 7` for 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
