"""Which of several failing processes failed first, and which part of its output is the reason.

When one rank fails, its peers fail because it is gone: the last errors are theirs, not the reason.
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

TRACEBACK = "Traceback (most recent call last):"
SHOWN_LINES = 30

# No peer's failure ends a process with these. Its connections close before its exit can be seen:
# by then its peers may have printed their tracebacks.
_NO_CONSEQUENCE = {
    128 + int(number) for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL)
}

# A rank that says such an error and ends with one of these has found it itself.
_FOUND = {2, 3, 4, 5}
_ERROR = re.compile(r"(?:\[rank \d+\] )?error: ")

# torch.distributed writes its rank before every line of a traceback.
_RANK = re.compile(r"\[rank\d+\]: ")

# What libraries still print when a failed process is torn down.
_AFTERTHOUGHT = re.compile(r"\[|Exception ignored in|W\d{4} |E\d{4} |\S+:\d+: \w*Warning:")


# The first error of a rank among those of many, and what launchers say of one that has ended.
_OF_RANK = re.compile(r"(\[rank ?(\d+)\])(?:: Traceback| error: )")
_DEATH = re.compile(
    r"\brank (\d+) (?:died|exited)"  # PALS
    r"|\btasks? (\d+)\S*: (?:Killed|Seg|Bus|Abort|Exited|Out Of Memory)"  # Slurm
    r"|process rank (\d+) with PID"  # Open MPI
)
_BY_SIGNAL = re.compile(r"signal|Killed|Segmentation|Bus error|Aborted|Out Of Memory")
_CODE = re.compile(r"Exited with exit code (\d+)")
_SIGNAL = re.compile(
    r"\b(?:from|on) signal (\d+)"  # PALS, Open MPI
    r"|^=   EXIT CODE: (\d+)$"  # Hydra, of one that did not exit by itself
    r"|failed \(exitcode: -(\d+)\)"  # torchrun
)
_WORDS = {"Killed": 9, "Out Of Memory": 9, "Segmentation": 11, "Bus error": 7, "Aborted": 6}
_END = re.compile(r"\[rank (\d+)\] ended with status (\d+)")


def end_line(rank: int, status: int) -> str:
    """What a rank says last to our launcher, which does not show it.

    Launchers lose statuses: srun gives 143, Hydra joins the bits of all, torchrun gives 1.
    """
    return f"[rank {rank}] ended with status {status}"


def is_end_line(line: str) -> bool:
    """Whether a line is only that, or those of several ranks."""
    return bool(line) and not _END.sub("", line)


class FirstError:
    """Which of the ranks behind one launcher failed first, as far as its output tells.

    Attributes:
        rank: its number; None: unknown.
        lines: what it said, or what the launcher said of it.
        statuses: rank -> status, as they said it, the earliest first.
        failed: a rank is known to have ended badly.
    """

    def __init__(self) -> None:
        self.rank: int | None = None
        self.lines: list[str] = []
        self.statuses: dict[int, int] = {}
        self._prefix = ""
        self._died = False
        self._death = 0  # its status, as the launcher says it

    @property
    def failed(self) -> bool:
        return self._died or any(self.statuses.values())

    def take(self, line: str) -> None:
        """Note a line; the earliest error counts, but a rank that was killed did not say one."""
        for rank, status in _END.findall(line):
            self.statuses.setdefault(int(rank), int(status))
        death = _DEATH.search(line)
        if death and not self._died:
            self._died = True
            self._death = _status_of_death(line)
            if self.rank is None or _BY_SIGNAL.search(line):
                self.rank = int(next(number for number in death.groups() if number))
                self.lines, self._prefix = [line], ""
        elif (own := _OF_RANK.match(line)) and self.rank is None:
            self.rank, self._prefix = int(own[2]), f"{own[1]}: "
            self.lines = [line]
        elif not self._died and _SIGNAL.search(line):  # of a rank that it does not name
            self._died, self._death = True, _status_of_death(line)
        elif self._prefix and line.startswith(self._prefix) and len(self.lines) < SHOWN_LINES:
            self.lines.append(line)

    def status(self, launchers: int, ranks: int) -> int:
        """The status of the run behind a launcher that ended with `launchers`.

        The first rank's that failed, as it said it, or as the launcher said it of a rank that could
        not; 0 where all `ranks` have ended with 0.
        """
        if len(self.statuses) == ranks and not any(self.statuses.values()):
            return 0
        failed = [status for status in self.statuses.values() if status]
        # Peers of a killed rank fail as well; a SIGTERM is the launcher's, or ours.
        killed = self._death > 128 and self._death != 128 + signal.SIGTERM
        if (killed and not _FOUND & set(failed)) or (self._death and not failed):
            return self._death
        if self.rank is not None and self.statuses.get(self.rank):
            return self.statuses[self.rank]
        return failed[0] if failed else launchers


def _status_of_death(line: str) -> int:
    """From what a launcher says of a rank's end; 0 where it does not tell."""
    if code := _CODE.search(line):
        return int(code[1])
    if number := _SIGNAL.search(line):
        return 128 + int(next(text for text in number.groups() if text))
    return next((128 + number for word, number in _WORDS.items() if word in line), 0)


@dataclass
class Ended:
    """How one process ended.

    Attributes:
        status: exit status; 128 + n where signal n killed it.
        at: when, seconds of a monotonic clock.
        stopped: a signal of ours ended it, sent because another failed or we were signalled.
        traceback_at: when it printed its last traceback; None: never.
        error_at: when it printed its first line `error: ...`; None: never.
        first: the error of one of many ranks behind it.
        errors: its last lines on standard error, else on standard output.
    """

    status: int
    at: float
    stopped: bool = False
    traceback_at: float | None = None
    error_at: float | None = None
    first: FirstError = field(default_factory=FirstError)
    errors: list[str] = field(default_factory=list)


def first_failure(ended: Sequence[Ended]) -> int | None:
    """Index of the process that failed first; None where none did.

    The exit may follow its traceback by a second, so the traceback counts. A process that was
    killed, not by us and without a traceback, and one that says an error of its own, rank before
    all that printed a traceback.
    """
    seen = {index: _first_sign(end) for index, end in enumerate(ended) if end.status}
    return min(seen, key=lambda index: seen[index], default=None)


def is_error(line: str) -> bool:
    """Whether a rank says why it ends: `error: ...` or `[rank 3] error: ...`."""
    return _ERROR.match(line) is not None


def _first_sign(end: Ended) -> tuple[float, float]:
    if end.status in _FOUND and end.error_at is not None:
        return -math.inf, end.error_at
    said = [at for at in (end.error_at, end.traceback_at) if at is not None]
    if end.status in _NO_CONSEQUENCE and not said and not end.stopped:
        return -math.inf, end.at
    signs = said or [math.inf]
    if not end.stopped:
        signs.append(end.at)
    return min(signs), end.at


def reason(lines: Sequence[str]) -> list[str]:
    """The reason among `lines`: the error that was said, the last traceback, or the last lines."""
    lines = [_RANK.sub("", line, count=1) for line in lines]
    said = next((i for i, line in enumerate(lines) if is_error(line)), None)
    starts = [i for i, line in enumerate(lines) if TRACEBACK in line]
    if said is not None:
        block, end = lines[said:], 0
        block = block[: next((i for i, line in enumerate(block) if TRACEBACK in line), len(block))]
    elif starts:
        block = lines[starts[-1] :]
        end = next((i for i, line in enumerate(block[1:], 1) if line[:1].strip()), len(block) - 1)
    else:
        return [line for line in lines if line.strip()][-10:]
    more = next(
        (i for i, line in enumerate(block) if i > end and _AFTERTHOUGHT.match(line)), len(block)
    )
    block = [line for line in block[:more] if line.strip()]
    return block if len(block) <= SHOWN_LINES else [block[0], "  ...", *block[2 - SHOWN_LINES :]]


def status_text(status: int) -> str:
    """`status 1`, or `status 137 (killed by SIGKILL; ...)`."""
    if status <= 128:
        return f"status {status}"
    try:
        name = signal.Signals(status - 128).name
    except ValueError:
        return f"status {status}"
    hint = "; the host may have run out of memory" if name == "SIGKILL" else ""
    return f"status {status} (killed by {name}{hint})"
