"""What a rank does before torch is there, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron import __version__
from megatron.launch.process import Notices
from megatron.launch.rank_process import run_to_end

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "pretrain_gpt_alcf.py")
PALS = {"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "3", "PALS_LOCAL_SIZE": "12"}


def rank(
    folder: Path, *argv: str, code: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    """pretrain_gpt_alcf.py, or `code`, where importing torch fails."""
    (folder / "torch.py").write_text("raise SystemExit('torch was imported')")
    return subprocess.run(
        [sys.executable, "-c", code, *argv] if code else [sys.executable, PROGRAM, *argv],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{folder}:{ROOT}", **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_version(tmp_path: Path) -> None:
    done = rank(tmp_path, "--version")
    assert done.returncode == 0
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["megatron"] == __version__ and lines["Python"] == sys.version.split()[0]
    assert set(lines) == {"megatron", "Python", "torch", "deepspeed"}


def test_help(tmp_path: Path) -> None:
    done = rank(tmp_path, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")


@pytest.mark.parametrize(("argv", "environ"), [([], {"DRY_RUN": "1"}), (["--dry-run"], {})])
def test_a_dry_run_trains_nothing(tmp_path: Path, argv: list[str], environ: dict[str, str]) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TP": "2"}
    done = rank(tmp_path, *argv, **environ, **ranks)
    assert done.returncode == 0, done.stderr
    assert "Dry run: nothing was started." in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torch.py"]
    other = rank(tmp_path, *argv, **(environ | ranks | {"RANK": "1", "LOCAL_RANK": "1"}))
    assert (other.returncode, other.stdout) == (0, "")


def test_a_rank_without_a_world_is_refused_before_torch(tmp_path: Path) -> None:
    done = rank(tmp_path, **PALS)
    assert done.returncode == 2
    assert done.stderr.startswith("error: PALS started this rank (PALS_RANKID=3 ")


def test_what_follows_the_configurations_file_is_not_ignored(tmp_path: Path) -> None:
    code = "import sys; from megatron.launch.start import configuration\n"
    code += "with configuration({}, sys.argv[1:]): pass"
    done = rank(tmp_path, "--config", "run.json", "--lr", "1", code=code)
    assert "--lr 1 is not read" in done.stderr


def test_sigusr1_before_training_is_noted_for_it(tmp_path: Path) -> None:
    code = """
import os, signal
from megatron.launch.rank_process import begin
came = begin([], {})
os.kill(os.getpid(), signal.SIGUSR1)
from megatron.launch.rank_process import run_to_end
print(came == [signal.SIGUSR1])
"""
    assert rank(tmp_path, code=code).stdout == "True\n"


def test_a_rank_says_its_status_last(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}

    def fails() -> int:
        raise KeyError("x")

    assert run_to_end(lambda: 0, environ) == 0
    assert capsys.readouterr().err == ""
    assert run_to_end(lambda: 4, environ | {"MEGATRON_WORLD_SIZE": "2"}) == 4
    assert capsys.readouterr().err == "[rank 1] ended with status 4\n"
    assert run_to_end(fails, environ | {"MEGATRON_WORLD_SIZE": "2"}) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[rank1]: Traceback (most recent call last):"
    assert lines[-2:] == ["[rank1]: KeyError: 'x'", "[rank 1] ended with status 1"]


def test_a_notice_waits_until_the_ranks_listen() -> None:
    listening: list[bool] = []
    notices = Notices(lambda: bool(listening), [signal.SIGUSR1])
    assert notices.due() == [] and not notices.keep(signal.SIGTERM)
    assert notices.keep(signal.SIGUSR1)
    listening.append(True)
    assert notices.due() == [signal.SIGUSR1]
    assert notices.due() == [] and not notices.keep(signal.SIGUSR1)
