"""The lines of a run: on the terminal at once, in the file once it may be and can be written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from megatron.launch import screen
from megatron.launch.screen import Screen

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the clock that retries and repeats are timed with."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes meanwhile: as on a full disk, a part may be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_go_to_both(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("an earlier start\n")
    with closing(Screen(log)) as lines:
        lines.line(b"one\n")
        lines.print("two", is_error=True)
        assert log.read_text() == "an earlier start\none\ntwo\n"
    assert capfd.readouterr() == ("one\n", "two\n")


def test_the_file_waits_until_it_is_ready(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, ready = tmp_path / "log", [False]
    with closing(Screen(log, lambda: ready[0])) as lines:
        lines.print("one")
        assert capfd.readouterr().out == "one\n"
        assert not log.exists()
        ready[0] = True
        lines.print("two")
        assert log.read_text() == "one\ntwo\n"


@pytest.mark.parametrize(("late", "kept", "text"), [(1, 0, "one\n"), (0, 1, "one\n"), (0, 0, "")])
def test_what_waits_at_the_end(tmp_path: Path, late: bool, kept: bool, text: str) -> None:
    """Written if the file became ready after the last line, or is to be kept; else nothing."""
    log, ready = tmp_path / "log", [False]
    with closing(Screen(log, lambda: ready[0])) as lines:
        lines.print("one")
        ready[0] = late
        if kept:
            lines.keep()
    assert (log.read_text() if log.exists() else "") == text


def test_a_full_disk_is_said_once_and_its_gap_in_the_file(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    with closing(Screen(log)) as lines:
        lines.print("first")
        with largest_file(9):
            for number in range(5):
                lines.print(f"line {number}")
                clock[0] += screen.RETRY_S / 2
        clock[0] += screen.RETRY_S
        lines.print("last")
    first, torn, gap, last = log.read_text().splitlines()
    assert (first, torn, last) == ("first", "lin", "last")
    assert gap.startswith("[5 lines are missing here: not written from 20")
    out, err = capsys.readouterr()
    assert out == "first\n" + "".join(f"line {n}\n" for n in range(5)) + "last\n"
    assert err.count("\n") == 1
    assert f"error: {log} cannot be written (File too large); the run goes on" in err


def test_a_gap_at_the_end_is_told_at_the_close(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Screen(tmp_path / "log")) as lines, largest_file(0):
        lines.print("one")
        lines.print("two")
    # The limit ends before the close.
    assert (tmp_path / "log").read_text().startswith("[2 lines are missing here")


def test_a_file_that_cannot_be_opened_is_tried_again(
    tmp_path: Path, clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / "log"
    log.symlink_to(tmp_path / "nowhere" / "log")
    with closing(Screen(log)) as lines:
        lines.print("one")
        log.unlink()
        clock[0] += screen.RETRY_S
        lines.print("two")
    assert log.read_text().splitlines()[1:] == ["two"]
    assert "[1 lines are missing here" in log.read_text()
    assert capfd.readouterr().err.count("cannot be written") == 1


def test_a_launcher_on_a_full_device_goes_on(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom megatron.launch.screen import Screen\n"
        "screen = Screen(Path('/dev/full'))\nfor n in range(1000):\n    screen.print(str(n))\n"
        "screen.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == [str(n) for n in range(1000)]
    assert done.stderr.count("No space left on device") == 1


def test_a_terminal_that_is_a_file_on_a_full_device_ends_nothing(tmp_path: Path) -> None:
    """As with `bash train_alcf.sh > file`."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom megatron.launch.screen import Screen\n"
        "screen = Screen(Path(sys.argv[1]))\nfor n in range(5000):\n    screen.print(str(n))\n"
        "screen.close()\n"
    )
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "log")],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "log").read_text().splitlines() == [str(n) for n in range(5000)]


def errors(lines: Screen, *ranks: int, text: str = "no such file") -> None:
    for rank in ranks:
        lines.line(f"[rank {rank}] error: {text}\n".encode(), True)


def test_ranks_that_fail_alike_are_one_line(
    clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(Screen()) as lines:
        errors(lines, 3)
        assert capfd.readouterr().err == "[rank 3] error: no such file\n"
        errors(lines, 0, 1, 2, 5)
        assert capfd.readouterr().err == ""
        lines.print("next")
        expected = "[the same on 4 other ranks: 0-2, 5]\n"
        assert capfd.readouterr() == (expected + "next\n", "")
        errors(lines, 7)
    assert capfd.readouterr().err == "[the same on 1 other rank: 7]\n"


def test_an_error_of_several_lines_is_counted_once(
    clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(Screen()) as lines:
        for rank in range(3):
            errors(lines, rank, text="first")
            errors(lines, rank, text="second")
    assert capfd.readouterr().err.splitlines() == [
        "[rank 0] error: first",
        "[rank 0] error: second",
        "[the same on 2 other ranks: 1-2]",
    ]


def test_what_is_not_the_same_is_shown(
    clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(Screen()) as lines:
        errors(lines, 0)
        errors(lines, 1, text="another file")
        errors(lines, 0)  # the same rank again
        clock[0] += screen.FOLD_S
        errors(lines, 2)  # much later
        lines.line(b"[rank 1] step 3\n", True)
        lines.line(b"[rank 2] step 3\n", True)
        lines.line(b"[rank 1] error: no such file\n", False)  # what it prints, not how it ends
    out, err = capfd.readouterr()
    assert out.splitlines() == ["[rank 1] error: no such file"]
    assert err.splitlines() == [
        "[rank 0] error: no such file",
        "[rank 1] error: another file",
        "[rank 0] error: no such file",
        "[rank 2] error: no such file",
        "[rank 1] step 3",
        "[rank 2] step 3",
    ]


def test_a_folded_line_is_folded_in_the_file_too(tmp_path: Path) -> None:
    with closing(Screen(tmp_path / "log")) as lines:
        errors(lines, 0, 1)
    assert (tmp_path / "log").read_text().splitlines() == [
        "[rank 0] error: no such file",
        "[the same on 1 other rank: 1]",
    ]


def test_a_new_file_is_readable_by_the_group(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with closing(Screen(tmp_path / "log")) as lines:
            lines.print("one")
    finally:
        os.umask(before)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640
