"""tools/plot.py, as a user runs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megatron.training import metrics_file
from tests.training import records_factory as make

ROOT = Path(__file__).resolve().parents[2]


def command(
    *arguments: str, encoding: str = "utf-8", path: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plot.py"), *arguments],
        capture_output=True,
        text=True,
        encoding=encoding,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": path},
    )


@pytest.fixture
def run(tmp_path: Path) -> str:
    rows = [*(make.step(i, 4.0 / i) for i in range(1, 20)), make.evaluation(10)]
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
    other = shutil.copy(f"{run}/metrics.jsonl", f"{run}/old.jsonl")
    done = command(run, other, f"{run}/metrics.jsonl", "--metric", "learning_rate", "--width", "60")
    assert done.stdout.splitlines()[-2:] == [f"* {run}"[:60], f"o {other}"[:60]]


def test_a_folder_of_runs_is_all_of_them(run: str, tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(f"{run}/metrics.jsonl", tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes").mkdir()
    lines = command(str(tmp_path / "runs")).stdout.splitlines()
    assert [line.rpartition("/")[2] for line in lines[-2:]] == ["a", "b"]


def test_validation_is_drawn_and_is_a_metric(run: str) -> None:
    assert command(run).stdout.splitlines()[0].strip() == "loss; o validation"
    done = command(run, "--metric", "validation")
    assert done.returncode == 0 and "2.5" in done.stdout


def test_a_picture_needs_matplotlib_and_says_so(run: str, tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    assert command(run, "--png", str(picture)).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "matplotlib.py").write_text("raise ImportError('none')\n")
    picture.unlink()
    done = command(run, "--png", str(picture), path=str(tmp_path / "absent"))
    assert (done.returncode, picture.exists()) == (2, False)
    assert "pip install matplotlib" in done.stderr


@pytest.mark.parametrize(("columns", "wide"), [(50, 50), (200, 200)])
@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_is_filled_and_two_runs_have_colours(
    run: str, columns: int, wide: int, no_color: str
) -> None:
    shutil.copy(f"{run}/metrics.jsonl", f"{run}/old.jsonl")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environ = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plot.py"), run, f"{run}/old.jsonl"],
        stdout=follower, timeout=60, check=True,
        env={**environ, "TERM": "xterm", "NO_COLOR": no_color, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal that was closed
        while block := os.read(leader, 65536):
            shown += block
    os.close(leader)
    text = shown.decode()
    assert ("\x1b[" in text) == (not no_color)
    lines = re.sub(r"\x1b\[\d+m", "", text).splitlines()
    assert max(map(len, lines)) == wide


def test_bad_input_has_its_status(run: str, tmp_path: Path) -> None:
    assert command(str(tmp_path / "absent")).returncode == 2
    unknown = command(run, "--metric", "lose")
    assert (unknown.returncode, "--metric lose" in unknown.stderr) == (2, True)
    assert "grad_norm" in unknown.stderr and "validation" in unknown.stderr
    assert command(run, "--width", "5").returncode == 2
    (tmp_path / "metrics.jsonl").write_text("x\n")
    assert command(run).returncode == 3
