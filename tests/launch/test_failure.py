"""Who failed first, and why."""

from __future__ import annotations

import signal

import pytest

from megatron.launch.failure import Ended, first_failure, reason, status_text


def test_nobody_failed() -> None:
    assert first_failure([Ended(0, 5.0), Ended(0, 6.0)]) is None


def test_the_oldest_traceback_beats_the_earliest_exit() -> None:
    """Rank 1 raised first; its peer lost the connection and was quicker to end."""
    peer = Ended(1, at=12.0, traceback_at=11.0)
    culprit = Ended(1, at=13.0, traceback_at=10.0)
    assert first_failure([peer, culprit, Ended(0, 9.0)]) == 1


def test_a_killed_process_beats_tracebacks_after_it() -> None:
    assert first_failure([Ended(1, 12.0, traceback_at=11.5), Ended(137, 11.0)]) == 1


@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_beats_tracebacks_that_were_seen_before_its_end(killed_by: int) -> None:
    """The kernel closes its connections first and takes its time with the rest."""
    peer = Ended(1, 12.0, traceback_at=10.8)
    assert first_failure([peer, Ended(128 + killed_by, 11.0)]) == 1
    assert first_failure([peer, Ended(128 + killed_by, 11.0, stopped=True)]) == 0
    assert first_failure([peer, Ended(128 + killed_by, 11.0, traceback_at=10.9)]) == 0


def test_those_that_we_stopped_come_last() -> None:
    stopped = Ended(143, at=3.0, stopped=True)
    assert first_failure([stopped, Ended(1, at=14.0)]) == 1
    # It was on its way out when we stopped it, as its traceback shows.
    stopped.traceback_at = 2.0
    assert first_failure([stopped, Ended(1, at=14.0)]) == 0


def test_reason_is_the_last_traceback_without_afterthoughts() -> None:
    lines = [
        "step 1",
        "Traceback (most recent call last):",
        '  File "old.py", line 1, in f',
        "KeyError: 'handled'",
        "step 2",
        "Traceback (most recent call last):",
        '  File "train.py", line 7, in step',
        "    raise ValueError(shape)",
        "ValueError: shapes (2, 3)",
        "and (4, 5) differ",
        "[rank1]:[W1121 ProcessGroup.cpp:1] Warning: not destroyed",
        "Exception ignored in: <function f>",
    ]
    assert reason(lines) == lines[5:10]


def test_reason_of_a_rank_of_torch_distributed() -> None:
    lines = [
        "[rank1]: Traceback (most recent call last):",
        '[rank1]:   File "train.py", line 7, in step',
        "[rank1]:     work.wait()",
        "[rank1]: RuntimeError: connection reset",
        "[rank1]:[W1121 06:45:05 ProcessGroup.cpp:1] Warning: not destroyed",
    ]
    assert reason(lines) == [line.removeprefix("[rank1]: ") for line in lines[:4]]


def test_reason_without_a_traceback_is_the_end() -> None:
    assert reason([f"line {n}" for n in range(40)] + [""]) == [f"line {n}" for n in range(30, 40)]
    assert reason([]) == []


def test_a_long_traceback_keeps_its_end() -> None:
    lines = ["Traceback (most recent call last):", *["  File"] * 300, "RecursionError: deep"]
    shown = reason(lines)
    assert len(shown) <= 30
    assert (shown[0], shown[-1]) == (lines[0], lines[-1])


def test_status_text() -> None:
    assert status_text(1) == "status 1"
    assert status_text(143) == "status 143 (killed by SIGTERM)"
    assert "memory" in status_text(137)
    assert status_text(255) == "status 255"
