"""tools/plot.py, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training import metrics_file
from tests.training import records_factory as make

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plot.py"), *arguments],
        capture_output=True,
        text=True,
        encoding=encoding,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )


@pytest.fixture
def run(tmp_path: Path) -> str:
    rows = [make.step(i, 4.0 / i) for i in range(1, 20)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{metrics_file.encode(row)}\n" for row in rows))
    return str(tmp_path)


def test_a_run_is_drawn(run: str) -> None:
    done = command(run)
    assert done.returncode == 0, done.stderr
    assert "\u2588" in done.stdout or "\u258c" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_a_terminal_without_unicode_gets_marks(run: str) -> None:
    done = command(run, encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert "*" in done.stdout


def test_two_runs_share_a_frame(run: str) -> None:
    done = command(run, f"{run}/metrics.jsonl", "--metric", "learning_rate", "--width", "60")
    assert done.stdout.splitlines()[-2:] == [f"* {run}"[:60], f"o {run}/metrics.jsonl"[:60]]


def test_bad_input_has_its_status(run: str, tmp_path: Path) -> None:
    assert command(str(tmp_path / "absent")).returncode == 2
    unknown = command(run, "--metric", "lose")
    assert (unknown.returncode, "--metric lose" in unknown.stderr) == (2, True)
    assert command(run, "--width", "5").returncode == 2
    (tmp_path / "metrics.jsonl").write_text("x\n")
    assert command(run).returncode == 3
