"""Child processes, watched to their end: lines and signals are passed on, nothing stays behind.

One that fails, or a hang, takes the others down: they get SIGTERM, and seconds later SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import IO, Any

from megatron.display.marked_line import unmarked
from megatron.launch.failure import TRACEBACK, Ended, FirstError, is_end_line, is_error

SETTLE_S = 1.0  # others that fail for the same reason get this long to print it
GRACE_S = 10.0
NOTICE_S = 120.0  # programs without heartbeats get a signal after this time
LINGER_S = 10.0  # a launcher may wait for ever for the peers of a rank that has failed
TICK_S = 0.05
DRAIN_S = 2.0
KEPT_LINES = 200
LONGEST_LINE = 1 << 16
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
HUNG = 124
PR_SET_PDEATHSIG = 1

Output = Callable[[bytes, bool], None]
"""Takes a line with its end, and whether it came from standard error."""

Hangs = Callable[[Sequence[int], bool], bool]
"""Asked in each turn: do the children hang? Takes the signals that came, and whether one failed."""


@dataclass(frozen=True)
class Child:
    """A process to start.

    Attributes:
        signals: that it would not survive -> what it is sent instead; 0: nothing.
        holds_ctrl_c: it begins with SIGINT blocked, and unblocks it once it can end in silence.
    """

    command: Sequence[str]
    environ: Mapping[str, str]
    signals: Mapping[int, int] = field(default_factory=dict)
    holds_ctrl_c: bool = False


class _Stream:
    """One pipe of a child, split into lines."""

    def __init__(self, pipe: IO[bytes], is_error: bool, output: Output, first: FirstError) -> None:
        self.pipe = pipe
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.traceback_at: float | None = None
        self.error_at: float | None = None
        self._first = first
        self._is_error = is_error
        self._output = output
        self._rest = b""

    def read(self) -> bool:
        """Pass on what is there; False at the end."""
        data = os.read(self.pipe.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)
        if self._rest and (not data or len(self._rest) > LONGEST_LINE):
            self._line(self._rest)
            self._rest = b""
        return bool(data)

    def _line(self, line: bytes) -> None:
        text = unmarked(line)[1].decode(errors="replace")
        self._first.take(text)
        if is_end_line(text):
            return
        self.lines.append(text)
        if TRACEBACK in text:
            self.traceback_at = time.monotonic()
        if self.error_at is None and is_error(text):
            self.error_at = time.monotonic()
        self._output(line + b"\n", self._is_error)


class _Running:
    """A child that was started."""

    def __init__(self, child: Child, output: Output, prepare: Callable[[], None] | None) -> None:
        self.process = subprocess.Popen(
            list(child.command),
            env=dict(child.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C of a terminal comes to us alone, and is passed on once
            preexec_fn=prepare,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.first = FirstError()  # Hydra tells of a killed rank on standard output
        self.out = _Stream(self.process.stdout, False, output, self.first)
        self.err = _Stream(self.process.stderr, True, output, self.first)
        self.ended: Ended | None = None
        self._failed_at: float | None = None
        self._signals = child.signals
        self._sent: set[int] = set()

    def poll(self) -> bool:
        """Whether it has ended; if so, processes that it left behind are ended too."""
        if self.ended is None and (code := self.process.poll()) is not None:
            status = code if code >= 0 else 128 - code
            self.ended = Ended(status, time.monotonic(), stopped=-code in self._sent)
            self.kill()
        return self.ended is not None

    def lingers(self, now: float) -> bool:
        """Whether a rank behind it has failed and it does not end the others."""
        if self._failed_at is None and self.first.failed:
            self._failed_at = now
        failed_at = self._failed_at
        return self.ended is None and failed_at is not None and now - failed_at > LINGER_S

    def send(self, number: int) -> None:
        """Pass a signal on, or what stands for it."""
        number = self._signals.get(number, number)
        if self.ended is None and number:
            self.process.send_signal(number)

    def terminate(self) -> None:
        """Ask it to stop."""
        if not self.poll():
            self._sent.add(signal.SIGTERM)
            self.process.terminate()

    def kill(self) -> None:
        """End it and all processes that it started."""
        self._sent.add(signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def result(self) -> Ended:
        """How it ended, with what it printed last."""
        assert self.ended is not None
        self.ended.errors = list(self.err.lines) or list(self.out.lines)
        self.ended.traceback_at = self.err.traceback_at
        self.ended.error_at = self.err.error_at
        self.ended.first = self.first
        return self.ended


class Notices:
    """SIGUSR1, sent long before a job's end, waits until the ranks listen: it would kill them.

    Args:
        listening: whether they do.
        early: signals that came before the ranks were started.
    """

    def __init__(self, listening: Callable[[], bool], early: Sequence[int] = ()) -> None:
        self._listening = listening
        self._kept = [signal.SIGUSR1] * (signal.SIGUSR1 in early)
        self._began = time.monotonic()
        self._open = False

    def keep(self, number: int) -> bool:
        """Keep a signal for later; False: pass it on now."""
        if self._open or number != signal.SIGUSR1:
            return False
        self._kept = [signal.SIGUSR1]
        return True

    def due(self) -> list[signal.Signals]:
        """Those to pass on now."""
        if self._open or not (self._listening() or time.monotonic() - self._began > NOTICE_S):
            return []
        self._open = True
        return self._kept


@dataclass
class Watched:
    """How the children ended, and what happened meanwhile."""

    ended: list[Ended]
    signals: list[int]
    hung: bool


def watch(
    children: Sequence[Child],
    output: Output,
    *,
    grace_s: float = GRACE_S,
    idle_timeout_s: float | None = None,
    hangs: Hangs | None = None,
    hung_grace_s: float = GRACE_S,
    notices: Notices | None = None,
    early: Sequence[int] = (),
) -> Watched:
    """Start children and wait until the last has ended.

    The signals of PASSED_ON are passed on to them; a third SIGINT ends them at once.

    Args:
        children: processes to start.
        output: called with every line that they print.
        grace_s: seconds between SIGTERM and SIGKILL once one has failed.
        idle_timeout_s: seconds without a line after which they count as hung; None: never.
        hangs: asked many times a second whether they hang; None: never.
        hung_grace_s: seconds between SIGTERM and SIGKILL once they hang.
        notices: signals that wait until the children listen; None: none wait.
        early: signals that came before: the children get them, but for SIGUSR1, as they start.

    Raises:
        OSError: one cannot be started; those started before it are ended.
    """
    running: list[_Running] = []
    with forwarding_signals(running, notices) as signals:
        try:
            signals += [number for number in early if number != signal.SIGUSR1]
            for child in children:
                prepare = _die_with_parent(holds_ctrl_c=child.holds_ctrl_c)
                running.append(_Running(child, output, prepare))
                for number in signals:  # nobody was there to pass them on to
                    running[-1].send(number)
            asked = partial(_asked, hangs, notices, signals, running)
            hung = _wait(running, (grace_s, hung_grace_s), idle_timeout_s, asked)
        finally:
            for one in running:
                if not one.poll():  # only where starting one of them failed
                    one.kill()
                    one.process.wait()
    return Watched([one.result() for one in running], signals, hung)


def _asked(
    hangs: Hangs | None,
    notices: Notices | None,
    signals: list[int],
    running: Sequence[_Running],
    failing: bool,
) -> bool:
    """Pass on the signals that are due; whether the children hang."""
    hung = hangs is not None and hangs(signals, failing)
    for number in notices.due() if notices else ():
        signals.append(number)
        for one in running:
            one.send(number)
    return hung


def _wait(
    running: Sequence[_Running],
    grace_s: tuple[float, float],
    idle_timeout_s: float | None,
    hangs: Callable[[bool], bool],
) -> bool:
    """Read and poll until all have ended; True where they hung."""
    hung = False
    stop_at = kill_at = float("inf")
    with selectors.DefaultSelector() as selector:
        for one in running:
            for stream in (one.out, one.err):
                selector.register(stream.pipe, selectors.EVENT_READ, stream)
        heard = time.monotonic()
        while not all([one.poll() for one in running]):
            if _read(selector, TICK_S):
                heard = time.monotonic()
            now = time.monotonic()
            failed = any(
                one.lingers(now) or (one.ended is not None and one.ended.status) for one in running
            )
            silent = idle_timeout_s is not None and now - heard > idle_timeout_s
            if not hung and (silent or hangs(failed)):
                hung, stop_at = True, now
            elif failed and stop_at == float("inf") and kill_at == float("inf"):
                stop_at = now + SETTLE_S
            if now >= stop_at:
                stop_at, kill_at = float("inf"), now + grace_s[hung]
                for one in running:
                    # One that has said an error is on its way out.
                    if hung or one.err.error_at is None or one.lingers(now):
                        one.terminate()
            if now >= kill_at:
                for one in running:
                    one.kill()
        until = time.monotonic() + DRAIN_S
        while selector.get_map() and time.monotonic() < until:
            _read(selector, TICK_S)
    return hung


def _read(selector: selectors.BaseSelector, timeout_s: float) -> bool:
    """Pass on what the pipes hold; True where there was something."""
    if not selector.get_map():
        time.sleep(timeout_s)
        return False
    ready = selector.select(timeout_s)
    for key, _ in ready:
        if not key.data.read():
            selector.unregister(key.fileobj)
            key.data.pipe.close()
    return bool(ready)


@contextmanager
def forwarding_signals(
    running: Sequence[_Running] = (), notices: Notices | None = None
) -> Iterator[list[int]]:
    """Pass signals on to the children meanwhile; gives the list of those received.

    A SIGHUP that nohup has made us ignore stays ignored.
    """
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if notices is not None and notices.keep(number):
            return
        came.append(number)
        for one in running:
            one.send(number)
            if one.ended is None and came.count(signal.SIGINT) >= 3:
                one.kill()

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    caught = [number for number in PASSED_ON if number not in ignored]
    former: dict[int, Any] = {number: signal.signal(number, forward) for number in caught}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _die_with_parent(*, holds_ctrl_c: bool = False) -> Callable[[], None] | None:
    """What a child runs before its program; on Linux it ends with us even if we are killed."""
    hold = partial(
        signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT} if holds_ctrl_c else ()
    )
    if not sys.platform.startswith("linux"):
        return hold
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def prepare() -> None:
        hold()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(128 + signal.SIGKILL)

    return prepare
