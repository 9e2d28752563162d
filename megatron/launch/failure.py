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

# torch.distributed writes its rank before every line of a traceback.
_RANK = re.compile(r"\[rank\d+\]: ")

# What libraries still print when a failed process is torn down.
_AFTERTHOUGHT = re.compile(r"\[|Exception ignored in|W\d{4} |E\d{4} |\S+:\d+: \w*Warning:")


@dataclass
class Ended:
    """How one process ended.

    Attributes:
        status: exit status; 128 + n where signal n killed it.
        at: when, seconds of a monotonic clock.
        stopped: a signal of ours ended it, sent because another failed or we were signalled.
        traceback_at: when it printed its last traceback; None: never.
        errors: its last lines on standard error, else on standard output.
    """

    status: int
    at: float
    stopped: bool = False
    traceback_at: float | None = None
    errors: list[str] = field(default_factory=list)


def first_failure(ended: Sequence[Ended]) -> int | None:
    """Index of the process that failed first; None where none did.

    The exit may follow its traceback by a second, so the traceback counts. A process that was
    killed, not by us and without a traceback, ranks before all that printed one.
    """
    seen = {index: _first_sign(end) for index, end in enumerate(ended) if end.status}
    return min(seen, key=lambda index: seen[index], default=None)


def _first_sign(end: Ended) -> tuple[float, float]:
    if end.status in _NO_CONSEQUENCE and end.traceback_at is None and not end.stopped:
        return -math.inf, end.at
    signs = [end.traceback_at if end.traceback_at is not None else math.inf]
    if not end.stopped:
        signs.append(end.at)
    return min(signs), end.at


def reason(lines: Sequence[str]) -> list[str]:
    """The reason among `lines`: the last traceback, else the last lines."""
    lines = [_RANK.sub("", line, count=1) for line in lines]
    starts = [index for index, line in enumerate(lines) if TRACEBACK in line]
    if not starts:
        return [line for line in lines if line.strip()][-10:]
    block = lines[starts[-1] :]
    end = next((i for i, line in enumerate(block[1:], 1) if line[:1].strip()), len(block) - 1)
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
