"""A run as a real terminal shows it: one of tmux's, 80 and 200 columns wide, narrow, resized."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from megatron.display.run_view import _continued
from tests.display.tmux import ENDED, Terminal

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux")

ROOT = Path(__file__).resolve().parents[2]

Open = Callable[..., Terminal]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens a terminal in which a run is replayed."""
    with ExitStack() as stack:

        def replay(width: int, *words: str, **environ: str) -> Terminal:
            program = [sys.executable, "-m", "tests.display.replay", str(tmp_path / "log"), *words]
            known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
            variables = {**known, "TERM": "screen-256color", **environ}
            return stack.enter_context(closing(Terminal(tmp_path, width, 40, program, variables)))

        yield replay


@pytest.mark.parametrize("width", [80, 200, 24])
def test_a_run_leaves_short_lines_and_no_bar(width: int, opened: Open, tmp_path: Path) -> None:
    terminal = opened(width, "40")
    assert terminal.ended(60) == 0
    lines = terminal.lines()
    stray = [line for line in lines if "stray" not in line and "xxx" not in line]
    assert all(len(line) <= width for line in lines)
    assert sum("/40" in line for line in stray) == 7  # steps 1, 10, 20, 30, 40, two evaluations
    steps = [line for line in stray if line.lstrip().startswith(("1/40", "10/40", "40/40"))]
    assert [line.split()[0] for line in steps] == ["1/40", "10/40", "40/40", "40/40"]
    assert "loss 7.5000" in steps[2] and ("validation loss 5.5" in steps[3] or width < 30)
    assert not any("left" in line or "\u2501" in line for line in lines)  # the rows are gone
    assert "a warning" in "\n".join(lines) and terminal.cursor_shown()
    # The file has every line in full, and no record.
    written = (tmp_path / "log").read_text()
    assert written.count("][training_log] - iteration=") == 42
    assert "\x1e" not in written and "attention: torch's flash" in written
    if width > 24:
        broken = [line for line in terminal.lines(joined=True) if len(line) > width]
        assert all("stray" in line for line in broken) and len(broken) == 2 * (width == 80)


def test_a_bar_shows_where_the_run_is(opened: Open) -> None:
    terminal = opened(80, "40", "hold")
    terminal.wait_for("left", 60)
    fields, bar = terminal.wait_for("val 5.5000 @ 20", 10)[-2:]
    assert "20/40  loss 8.0000  norm 1.50  lr 3.00e-03" in fields and fields.endswith(
        "tok/s  71GFLOPS"
    )
    assert "\u2501" in bar and " 50% " in bar and "0.50 GiB" in bar
    assert any("\x1b[" in line for line in terminal.lines(colours=True))
    assert terminal.cursor_shown()
    # A narrower terminal breaks the rows; none of their pieces stays.
    for width in (50, 34, 120):
        terminal.resize(width, 40)
        time.sleep(0.6)
    lines = terminal.lines()
    assert sum("\u2501" in line for line in lines) == 1, "\n".join(lines)
    assert sum("20/40  loss" in line for line in lines) == 2, "\n".join(lines)


def test_without_colours(opened: Open) -> None:
    terminal = opened(80, "40", NO_COLOR="1")
    assert terminal.ended(60) == 0
    text = "\n".join(terminal.lines(colours=True))
    assert "\x1b[3" not in text.replace("\x1b[39m", "")
    assert "loss 7.5000  norm" in "\n".join(terminal.lines())


def test_a_dumb_terminal_gets_the_full_lines(opened: Open, tmp_path: Path) -> None:
    terminal = opened(200, "40", TERM="dumb")
    assert terminal.ended(60) == 0
    assert sum("[training_log] - iteration=" in line for line in terminal.lines()) == 42


def test_an_error_is_the_last_thing_on_the_screen(opened: Open) -> None:
    terminal = opened(80, "40", "error")
    assert terminal.ended(60) == 1
    assert terminal.lines()[-3:-1] == ["rank 0 failed with status 1:", "ValueError: it broke"]
    assert terminal.lines()[-1] == f"{ENDED} 1]" and terminal.cursor_shown()


def test_a_long_command_can_be_copied() -> None:
    words = ["TRAIN_ITERS=400", "bash", "train_alcf.sh", "--resume", "runs/a-name-of-a-run"]
    for width in range(20, 90):
        lines = _continued("resume        ", words, width)
        assert "\n".join(lines).replace("resume", "", 1).replace("\\\n", " ").split() == words
        assert all(len(line) <= max(width, 16 + max(map(len, words))) for line in lines)
    assert _continued("resume        ", words, 80) == [
        "resume        TRAIN_ITERS=400 bash train_alcf.sh --resume runs/a-name-of-a-run"
    ]
    assert _continued("resume        ", words, 70) == [
        "resume        TRAIN_ITERS=400 bash train_alcf.sh --resume \\",
        "              runs/a-name-of-a-run",
    ]
