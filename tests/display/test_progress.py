"""A bar of a tool: lines with the time left in a pipe, a bar that goes away on a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.display import run_view as view
from megatron.display.marked_line import marked, unmarked
from megatron.display.progress import BYTES, Bar, TerminalBar, progress
from megatron.display.run_view import run_view


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds of the clock that bars look at."""
    now = [100.0]
    monkeypatch.setattr("megatron.display.progress.time.monotonic", lambda: now[0])
    yield now


def test_a_line_every_few_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("checking", 40, "files", done=8) as bar:
        for _ in range(32):
            clock[0] += 0.5
            bar.detail = f"{int(bar.done)} done"
            bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        # 4 files took 2 s, so the other 28 take 14; those of the earlier start took no time.
        "checking: 30.0%, 12 of 40 files, 0:00:14 left, 11 done",
        "checking: 55.0%, 22 of 40 files, 0:00:09 left, 21 done",
        "checking: 80.0%, 32 of 40 files, 0:00:04 left, 31 done",
        "checking: 100.0%, 40 of 40 files, 39 done, 0:00:16",
    ]


def test_short_work_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("checking", 2, "files") as bar:
        clock[0] += 0.9
        bar.advance()
        clock[0] += 0.9
        bar.advance()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [
        (1.25e9, 9.8e9, BYTES, "1.2 of 9.8 GB"),
        (5e2, 2e3, BYTES, "0.5 of 2.0 kB"),
        (5e6, None, BYTES, "5.0 MB"),
        (1200, 34567, "files", "1,200 of 34,567 files"),
        (12, None, "", "12"),
    ],
)
def test_counts(done: float, total: float | None, unit: str, text: str) -> None:
    assert Bar("", total, unit, done, 5.0).counts() == text


def test_a_failure_ends_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="full"), progress("writing", 3, interval_s=0) as bar:
        bar.advance()
        raise OSError("full")
    assert "writing: 33.3%" in capsys.readouterr().err


class Tty(io.StringIO):
    """A terminal, for those who ask."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream := Tty())
    with progress("merging", 10, "files") as bar:
        assert isinstance(bar, TerminalBar)
        bar.advance(4)
        bar.say("a line")
    text = stream.getvalue()
    assert "merging" in text and " 40%" in text and "4 of 10 files" in text and "a line" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stderr", stream := Tty())
    with progress("merging", 10, "files", interval_s=0) as bar:
        bar.advance(4)
    assert stream.getvalue().startswith("merging: 40.0%, 4 of 10 files")
    monkeypatch.setattr(view, "find_spec", lambda name: None)
    shown, why = run_view("auto", Tty())
    assert shown is None and "has no package rich" in why


@pytest.mark.parametrize(
    ("style", "stream", "live", "word"),
    [
        ("auto", Tty(), True, ""),
        ("live", Tty(), True, ""),
        ("line", Tty(), False, ""),
        ("auto", io.StringIO(), False, ""),
        ("live", io.StringIO(), False, "LOG_STYLE=live has no effect"),
    ],
)
def test_log_style(
    style: str, stream: io.StringIO, live: bool, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown, why = run_view(style, stream)
    assert (shown is not None) == live and word in why and bool(why) == bool(word)


def test_a_record_travels_with_its_line() -> None:
    record = {"event": "step", "loss": float("inf"), "text": "a | \x1e b\n"}
    line = f"{marked('[now][INFO] - iteration=1', record)}\n".encode()
    assert line.count(b"\n") == 1
    assert unmarked(line) == (record, b"[now][INFO] - iteration=1\n")
    for other in (b"a line\n", b"\x1eno json\x1erest\n", b"\x1e[1]\x1erest\n", b"\x1e{}\n", b""):
        assert unmarked(other) == (None, other)


def test_tools_draw_no_bars_of_their_own() -> None:
    root = Path(__file__).resolve().parents[2]
    drawing = [
        str(path.relative_to(root))
        for path in [*root.glob("tools/*.py"), *root.glob("megatron/**/*.py")]
        if "display" not in path.parts and "rich" in path.read_text().split()
    ]
    assert drawing == []
