"""Submitting: the script, its directives, and what qsub and sbatch are given."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.launch import submit
from megatron.launch.machines import MACHINES, find_machine

AURORA, PERLMUTTER = "x4310c7s4b0n0", "perlmutter"
Printed = pytest.CaptureFixture[str]
SMALL = ("NLAYERS=2", "DATA_FILE_LIST=builtin", "TRAIN_ITERS=10", "TRAIN_TOKENS=", "--run-dir")


@pytest.fixture
def spooler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """qsub and sbatch that note what they are given; the number of the job is what they print."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("qsub", "$n.server"), ("sbatch", "$n;cluster")):
        (folder / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >>{folder}/log\n'
            f'n=$(grep -c . {folder}/log)\n[[ -z "$REFUSE" || $n -lt $REFUSE ]] || '
            f'{{ echo "queue is closed" >&2; exit 7; }}\necho "{text}"\n'
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("REFUSE", "")
    return folder / "log"


def typed(
    monkeypatch: pytest.MonkeyPatch, hostname: str, *words: str, **environ: str
) -> tuple[int, dict[str, str]]:
    """Type `submit ...` on a login node; its status, and the environment it was given."""
    monkeypatch.setattr("socket.gethostname", lambda: hostname)
    return submit.main(words, environ), environ


def test_a_chain_on_pbs(
    spooler: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Printed,
) -> None:
    folder = tmp_path / "the run"
    words = ("-A", "Mine", "-q", "prod", "-N", "4", "-t", "6:00:00", "--chain", "3", "--")
    status, _ = typed(monkeypatch, AURORA, *words, *SMALL, str(folder), TP="2", HOSTFILE="old")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    (script,) = (folder / "jobs").glob("*.sh")
    text = script.read_text(encoding="utf-8")
    for line in ("-A Mine", "-q prod", "-l select=4", "-l walltime=6:00:00", "-j oe"):
        assert f"#PBS {line}\n" in text
    assert "#PBS -l filesystems=home:flare\n" in text
    assert f"#PBS -o '{script.parent}/'\n" in text
    assert "#PBS -N the-run\n" in text
    assert "export TP=2\nexport NLAYERS=2\n" in text
    assert "HOSTFILE" not in text
    assert text.endswith(f"exec bash train_alcf.sh --run-dir '{folder}'\n")
    assert spooler.read_text(encoding="utf-8").splitlines() == [
        f"qsub {script}",
        f"qsub -W depend=afterany:1.server {script}",
        f"qsub -W depend=afterany:2.server {script}",
    ]
    assert "job 3 of 3: 3.server" in printed.out
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_a_chain_on_slurm(spooler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("-A", "m1", "-q", "regular", "-N", "2", "--directive=--mail-type=END", "--chain", "2")
    status, _ = typed(monkeypatch, PERLMUTTER, *words, "--", *SMALL, str(tmp_path / "r"))
    assert status == 0
    (script,) = (tmp_path / "r" / "jobs").glob("*.sh")
    lines = [line[8:] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert lines == [
        "--job-name=r", "--account=m1", "--qos=regular", "--nodes=2", "--time=1:00:00",
        f"--output={script.parent}/%x-%j.log", "--signal=B:USR1@300", "--constraint=gpu",
        "--mail-type=END",
    ]  # fmt: skip
    assert spooler.read_text().splitlines() == [
        f"sbatch --parsable {script}",
        f"sbatch --parsable --dependency=afterany:1 {script}",
    ]


def test_a_dry_run_prints_and_leaves_nothing(
    spooler: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Printed,
) -> None:
    words = ("--dry-run", "-A", "Mine", "--filesystems", "home:eagle", "--", "DATA_FILE_LIST=none")
    status, _ = typed(monkeypatch, AURORA, *words, "--run-dir", str(tmp_path / "r"))
    printed = capsys.readouterr().out
    assert status == 0 and "#PBS -l filesystems=home:eagle\n" in printed
    assert "flare" not in printed
    assert not spooler.exists() and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("-A", "x", "--", "TP=5"), 2, "TP=5"),
        (("-A", "x", "--", "NLAYER=4", "DATA_FILE_LIST=builtin"), 2, "IGNORE_VARIABLES=NLAYER"),
        (("-A", "x", "--", "NHOSTS=3", "DATA_FILE_LIST=builtin"), 2, "give --nodes 3"),
        (("-A", "x", "--", "DATA_FILE_LIST=missing.txt"), 3, "missing.txt"),
        (("--", "DATA_FILE_LIST=builtin"), 2, "give -A PROJECT"),
    ],
)
def test_what_a_job_would_refuse_is_refused_before_the_queue(
    words: tuple[str, ...], status: int, said: str, spooler: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Printed,
) -> None:  # fmt: skip
    assert typed(monkeypatch, AURORA, *words)[0] == status
    assert said in capsys.readouterr().err
    assert not spooler.exists()


def test_a_slip_of_the_shell_is_refused_too(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    words = ("-A", "x", "--dry-run", "--", *SMALL, "/nowhere/run")
    assert typed(monkeypatch, AURORA, *words, NLAYER="4")[0] == 2
    assert "the variable is called NLAYERS" in capsys.readouterr().err
    assert typed(monkeypatch, AURORA, *words, NLAYER="4", IGNORE_VARIABLES="NLAYER")[0] == 0


def test_a_scheduler_that_refuses_is_quoted(
    spooler: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Printed,
) -> None:
    monkeypatch.setenv("REFUSE", "2")
    words = ("-A", "x", "--chain", "3", "--", *SMALL, str(tmp_path / "r"))
    assert typed(monkeypatch, AURORA, *words)[0] == 2
    said = capsys.readouterr().err
    assert "ended with status 7: queue is closed (submitted before: 1.server)" in said


def test_the_scheduler_is_the_one_asked_for_the_machines_or_the_installed() -> None:
    def none(name: str) -> None:
        return None

    generic = find_machine("box", {})
    assert submit.find_scheduler("slurm", find_machine(AURORA, {}), none) == "slurm"
    assert submit.find_scheduler(None, find_machine(AURORA, {}), none) == "pbs"
    assert submit.find_scheduler(None, generic, lambda name: name * (name == "sbatch")) == "slurm"
    with pytest.raises(ConfigError, match="--pbs or --slurm"):
        submit.find_scheduler(None, generic, none)


def test_every_pbs_machine_names_its_file_systems() -> None:
    for machine in MACHINES:
        has = any("filesystems" in words for words in machine.directives)
        assert has == (machine.scheduler == "pbs"), machine.name
