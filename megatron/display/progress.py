"""A bar with the time left, for work of more than two seconds; lines where there is no terminal.

    with progress("checking", len(paths), "files") as bar:
        for path in paths:
            check(path)
            bar.advance()

A program opens the bar and hands `bar.advance` down: rooms below take a function, such as
`advance: Advance = ignored`, and print nothing. `bar.say(text)` prints a line that stays, above
the bar, as `print` does meanwhile; `bar.detail = text` ends the bar's line, such as a rate. The bar
is on standard error and leaves nothing behind on a terminal; elsewhere work of less than two
seconds prints nothing, and longer work a line every `interval_s` seconds. Any thread may call them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

QUIET_S = 2.0  # work of this length needs no line
BYTES = "bytes"
_SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))

Advance = Callable[[float], object]
"""Takes an amount of work that has been done."""


def ignored(amount: float) -> None:
    """Advance of work that nobody watches."""


class Bar:
    """Work that is counted, with a line every few seconds.

    Args:
        title: what is done, such as "checking".
        total: how much there is to do; None: nobody knows.
        unit: of `total`, such as "files"; BYTES is shown as kB to TB.
        done: by an earlier start: it does not count for the time left.
        interval_s: seconds between two lines.

    Attributes:
        detail: ends the line.
    """

    def __init__(
        self, title: str, total: float | None, unit: str, done: float, interval_s: float
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._before = done
        self.detail = ""
        self._began = time.monotonic()
        self._interval_s = interval_s
        self._due = self._began + min(QUIET_S, interval_s)
        self._said = False
        self._lock = threading.Lock()

    def advance(self, amount: float = 1.0) -> None:
        """Count work that has been done."""
        with self._lock:
            self.done += amount
            self._changed()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """The work has ended: a last line where there was a first one."""
        if self._said:
            self.say(f"{self.title}: {self._text()}, {clock(time.monotonic() - self._began)}")

    def counts(self) -> str:
        """`1.2 of 9.8 GB`, `12 of 40 files`."""
        if self.unit == BYTES:
            most = self.done if self.total is None else self.total
            name, size = next((pair for pair in _SIZES if most >= pair[1]), _SIZES[-1])
            of = "" if self.total is None else f" of {self.total / size:,.1f}"
            return f"{self.done / size:,.1f}{of} {name}"
        of = "" if self.total is None else f" of {self.total:,.0f}"
        return f"{self.done:,.0f}{of} {self.unit}".rstrip()

    def left(self) -> str:
        """`0:01:20 left`, at the rate so far; empty where it is not known."""
        did, seconds = self.done - self._before, time.monotonic() - self._began
        if self.total is None or did <= 0 or self.done >= self.total:
            return ""
        return f"{clock((self.total - self.done) * seconds / did)} left"

    def _changed(self) -> None:
        """Called with each advance."""
        if (now := time.monotonic()) >= self._due:
            self._due, self._said = now + self._interval_s, True
            self.say(f"{self.title}: {self._text()}")

    def _text(self) -> str:
        share = f"{self.done / self.total:.1%}" if self.total else ""
        return ", ".join(filter(None, (share, self.counts(), self.left(), self.detail)))


class TerminalBar(Bar):
    """The same as a bar that is drawn four times a second, and is gone at the end."""

    def __init__(
        self, title: str, total: float | None, unit: str, done: float, console: Console
    ) -> None:
        from rich.live import Live

        super().__init__(title, total, unit, done, QUIET_S)
        self._live = Live(
            get_renderable=self._row, console=console, transient=True, refresh_per_second=4,
            # What others print goes above the bar; a redirected output keeps its file.
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self._live.start()
        console.show_cursor(True)  # whatever kills us leaves the terminal as it was

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """The work has ended: the bar goes away."""
        self._live.stop()

    def _changed(self) -> None:
        """The live display draws by itself."""

    def _row(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 1, 0, 0), expand=True)
        share = f"{self.done / self.total:4.0%}" if self.total else ""
        seconds = f"{time.monotonic() - self._began:.0f} s"
        words = [share, self.counts(), self.left() or seconds]
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_column(min_width=8, ratio=1)
        for _ in words:
            row.add_column(no_wrap=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(self.total, self.done)
        row.add_row(Text(self.title), bar, *words, Text(self.detail, style="dim"))
        return row


@contextmanager
def progress(
    title: str,
    total: float | None = None,
    unit: str = "",
    *,
    done: float = 0.0,
    interval_s: float = 5.0,
) -> Iterator[Bar]:
    """A bar while work goes on. Arguments as of `Bar`."""
    console = terminal(sys.stderr)
    if console is None:
        bar = Bar(title, total, unit, done, interval_s)
    else:
        bar = TerminalBar(title, total, unit, done, console)
    try:
        yield bar
    finally:
        bar.close()


def terminal(stream: TextIO) -> Console | None:
    """A console on a stream that is a terminal which can be drawn on; None where it is none.

    NO_COLOR and TERM=dumb are respected. None as well where `rich` is not installed.
    """
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream)
    return None if console.is_dumb_terminal else console


def clock(seconds: float) -> str:
    """`0:01:20`, `1 day, 2:03:04`."""
    return str(timedelta(seconds=round(seconds)))
