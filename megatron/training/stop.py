"""What asks a run to save and stop: a signal to any rank, the file RUN/STOP, the time.

A rank only notes it; the Trainer agrees on it with all ranks, after each step, each batch of an
evaluation and each save.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

STOP_FILE, DURATION, WALLTIME, INTERVAL = 101, 102, 103, 104
"""Causes that are no signal: above all signals' numbers, so that one number holds any cause."""

CAUSES = {
    STOP_FILE: "the file STOP in the run's folder",
    DURATION: "EXIT_DURATION_IN_MINS",
    WALLTIME: "the end of the job's walltime",
    INTERVAL: "EXIT_INTERVAL",
}

RECENT_STEPS = 16
"""The first step compiles; it does not predict the last."""

FIRST_SAVE_S = 60.0
"""Assumed length of a save before one was measured."""

SPARE_S = 10.0
"""Left between the expected end of the last save and the end of the walltime."""


def cause_text(cause: int) -> str:
    """A cause as the log names it."""
    return CAUSES.get(cause) or f"signal {signal.Signals(cause).name}"


class StopRequest:
    """Remembers the first signal; a second SIGINT ends the process at once.

    A context manager around training, which restores the previous handlers at its end.

    Args:
        file: asks a run to stop by being there; None on ranks that do not look.
        stop_at: wall-clock time, seconds since the epoch, of EXIT_DURATION_IN_MINS; None: never.
        job_end: when the scheduler ends the job; None where unknown.
        clock: seconds since the epoch.
        signals: that came before; read once, when this listens itself.
    """

    def __init__(
        self,
        file: Path | None = None,
        stop_at: float | None = None,
        job_end: float | None = None,
        clock: Callable[[], float] = time.time,
        signals: Sequence[int] = (),
    ) -> None:
        self._file, self._stop_at, self._job_end, self._clock = file, stop_at, job_end, clock
        self._signal, self._before = 0, signals
        self._looked = self._began = clock()
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._longest_save: float | None = None
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._note)
        self._signal = self._signal or next(iter(self._before), 0)
        if self._file is not None and self._file.exists():
            log.warning(f"{self._file} is from before this start: removed")
            self.remove_file()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number

    def cause(self) -> int:
        """What asks this rank to stop: a signal's number, one of CAUSES, or 0."""
        now = self._clock()
        if self._signal:
            return self._signal
        if self._stop_at is not None and now >= self._stop_at:
            return DURATION
        if self._job_end is not None and now + self._reserve() >= self._job_end:
            return WALLTIME
        # Once a second is often enough for a person, and cheap on a shared file system.
        if self._file is not None and now - self._looked >= 1.0:
            self._looked = now
            return STOP_FILE if self._file.exists() else 0
        return 0

    def step_took(self) -> None:
        """A step has ended; its seconds decide how early the run stops before its walltime."""
        now = self._clock()
        self._steps.append(now - self._began)
        self._began = now

    def save_took(self, seconds: float) -> None:
        """A save has ended; the longest one counts likewise."""
        self._longest_save = max(self._longest_save or 0.0, seconds)

    def step_begins(self) -> None:
        """A step begins: evaluation and saving before it are not its time."""
        self._began = self._clock()

    def remove_file(self) -> None:
        """Removes the file, whose request is answered: the next start is not to stop at once."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _reserve(self) -> float:
        """Seconds that one more step and a save may take, twice as long as ever before."""
        save = FIRST_SAVE_S if self._longest_save is None else self._longest_save
        return 2 * (max(self._steps, default=0.0) + save) + SPARE_S
