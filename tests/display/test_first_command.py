"""`bash train_alcf.sh` in a terminal: few short lines, all in the file, Ctrl-C in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.display.test_legend import NAMED
from tests.display.tmux import Terminal
from tests.e2e.front_door import TINY, command, environment
from tests.e2e.test_front_door import rank_process

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short name, as a run's folder usually has: pytest's would break lines."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as name:
        yield Path(name)


def opened(folder: Path, width: int, **variables: str) -> Terminal:
    """A terminal in which a tiny run begins."""
    shown = {"TERM": "screen-256color", "LANG": "C.UTF-8", "RUN_DIR": str(folder / "run")}
    return Terminal(folder, width, 50, command(), environment({**TINY, **shown, **variables}))


@pytest.mark.parametrize("width", [80, 200])
def test_no_line_is_broken_and_less_than_60_in_all(width: int, folder: Path) -> None:
    with closing(opened(folder, width, TRAIN_ITERS="200", SPIKE_POLICY="off")) as terminal:
        assert terminal.ended(250) == 0
        lines, joined = terminal.lines(), terminal.lines(joined=True)
        assert terminal.cursor_shown()
    print("\n".join(lines))
    assert lines == joined and max(map(len, lines)) <= width
    sample = lines.index("Sample from the model (generated after [...]):")
    end = next(n for n, line in enumerate(lines) if line.startswith("report  "))
    few = min(end - sample, 15)  # of a trained model's; this one's has a line a token
    assert len(lines) - (end - sample) + few < 60
    text = "\n".join(lines)
    for word in ("NLAYERS=4", "  1/200  loss", "100/200  validation loss", "iteration",
                 "Sample from the model", "resume        TRAIN_ITERS=400 bash"):  # fmt: skip
        assert word in text
    assert "\u2501" not in text and "[training_log]" not in text
    written = (folder / "run" / "output.log").read_text()
    numbers = re.findall(r"\]\[training_log\] - iteration= *(\d+)/ *200 \| consumed_s", written)
    assert [int(number) for number in numbers] == list(range(1, 201))
    assert "\x1e" not in written and "\x1b" not in written
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert {key for record in records for key in record} <= NAMED


@pytest.mark.parametrize("wait_s", [0.0, 0.3, 2.0])
def test_interrupted_while_torch_is_imported(wait_s: float, folder: Path) -> None:
    with closing(opened(folder, 80, TRAIN_ITERS="100000", TP="2")) as terminal:
        terminal.wait_for("starting the ranks", 60)
        time.sleep(wait_s)
        terminal.press("C-c")
        assert terminal.ended(60) == 128 + signal.SIGINT
        lines = terminal.lines()
    assert not any("Traceback" in line or "File" in line for line in lines), "\n".join(lines)
    told = [n for n, line in enumerate(lines) if "ended by SIGINT, which the run was sent" in line]
    assert told == [len(lines) - 2], "\n".join(lines)  # the last is the terminal's


def test_interrupted_in_training(folder: Path) -> None:
    with closing(opened(folder, 80, TRAIN_ITERS="100000")) as terminal:
        terminal.wait_for(" left", 120)
        terminal.press("C-c")
        assert terminal.ended(60) == 0
        lines = terminal.lines()
        assert terminal.cursor_shown()
    assert "SIGINT: saved step" in "\n".join(lines[-5:])
    assert not any("\u2501" in line for line in lines)


def test_a_killed_rank_leaves_a_sane_terminal(folder: Path) -> None:
    with closing(opened(folder, 80, TRAIN_ITERS="100000", TP="2")) as terminal:
        terminal.wait_for(" left", 120)
        os.kill(rank_of(folder / "run", "1"), signal.SIGKILL)
        assert terminal.ended(60) == 128 + signal.SIGKILL
        lines = terminal.lines()
        assert terminal.cursor_shown()
    assert "rank 1 failed with status 137" in "\n".join(lines[-4:])
    assert not any("\u2501" in line for line in lines)


def rank_of(run: Path, rank: str) -> int:
    """The process of a rank of the run in a folder."""
    launchers = json.loads((run / "claim.json").read_text())
    return rank_process(launchers["pid"], rank)
