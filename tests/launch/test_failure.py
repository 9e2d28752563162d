"""Who failed first, and why."""

from __future__ import annotations

import signal

import pytest

from megatron.launch.failure import Ended, FirstError, first_failure, is_error, reason, status_text


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


def test_an_error_that_a_rank_found_itself_beats_tracebacks_seen_before_it() -> None:
    """Both lines may be read in one turn of the launcher's loop, in any order."""
    peer = Ended(1, 12.0, traceback_at=10.8)
    found = Ended(3, 12.1, error_at=10.9)
    assert first_failure([peer, found]) == 1
    assert first_failure([found, peer]) == 0
    assert first_failure([peer, Ended(1, 12.1, error_at=10.9)]) == 0
    assert first_failure([Ended(3, 12.2, error_at=11.0), found]) == 1


def test_an_error_that_was_said_counts_when_it_was_said() -> None:
    """A traceback of its teardown, or our SIGTERM, comes later."""
    peer = Ended(1, 12.0, traceback_at=10.8)
    assert first_failure([peer, Ended(1, 13.0, error_at=10.0, traceback_at=12.0)]) == 1
    assert first_failure([peer, Ended(143, 13.0, error_at=10.0, stopped=True)]) == 1


def test_what_an_error_looks_like() -> None:
    assert is_error("error: HIDDEN=7 is odd")
    assert is_error("[rank 12] error: data.bin ends at 7")
    assert not is_error("2026-11-21 [ERROR] error: step 4 was not saved")
    assert not is_error("no error: fine")


def test_reason_is_the_error_that_was_said_with_its_lines() -> None:
    lines = [
        "step 1",
        "[rank 1] error: data.bin ends at byte 7",
        "  expected 9 bytes; copy it again",
        "Traceback (most recent call last):",
        '  File "teardown.py", line 1, in f',
        "ConnectionError: gone",
    ]
    assert reason(lines) == lines[1:3]
    assert reason([*lines[:3], "[W1121 ProcessGroup.cpp:1] Warning: not destroyed"]) == lines[1:3]


def first_of(*lines: str) -> tuple[int | None, list[str]]:
    first = FirstError()
    for line in lines:
        first.take(line)
    return first.rank, first.lines


def test_the_first_error_among_the_lines_of_many_ranks() -> None:
    traceback = [
        "[rank7]: Traceback (most recent call last):",
        "[rank3]: Traceback (most recent call last):",
        '[rank7]:   File "a.py", line 1',
        "step 4",
        "[rank7]: ValueError: wrong",
    ]
    assert first_of(*traceback) == (7, [traceback[0], traceback[2], traceback[4]])
    assert first_of("step 4", "[rank 2] error: no data", *traceback) == (
        2,
        ["[rank 2] error: no data"],
    )
    assert first_of("step 4", "[W1121 rank 3 waits]") == (None, [])


@pytest.mark.parametrize(
    "line",
    [
        "x4217c2s6b0n0.hsn.cm.aurora: rank 5 died from signal 9",
        "srun: error: nid001: task 5: Killed",
        "mpirun noticed that process rank 5 with PID 77 on node a exited on signal 9 (Killed).",
    ],
)
def test_what_launchers_say_of_a_killed_rank(line: str) -> None:
    """It could not say why; the tracebacks of its peers are not the reason."""
    consequence = "[rank1]: Traceback (most recent call last):"
    assert first_of(consequence, line) == (5, [line])
    assert first_of(line, consequence, "srun: error: nid001: task 6: Killed") == (5, [line])


def test_a_launcher_that_repeats_a_status_does_not_hide_the_error() -> None:
    error = "[rank 1] error: no data"
    assert first_of(error, "srun: error: nid001: task 0: Exited with exit code 1") == (1, [error])
