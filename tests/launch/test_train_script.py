"""train_alcf.sh itself, with stand-ins for what it would install."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL_TOOLS = [
    "bash",
    "dirname",
    "hostname",
    "grep",
    "cat",
    "mkdir",
    "mv",
    "rm",
    "tail",
    "sleep",
    "tr",
]


def run(
    folder: Path, *argv: str, script: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """train_alcf.sh from `folder`, with the tests' interpreter active and few other variables."""
    # Its prefix, not its file: the file of a virtual environment may be a link to another one.
    paths = f"{sys.prefix}/bin:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(script or ROOT / "train_alcf.sh"), *argv],
        cwd=folder,
        env={"PATH": paths, "VIRTUAL_ENV": sys.prefix, "HOME": str(folder), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what a start needs, with a training program that only prints what it was given."""
    copy = tmp_path / "project"
    (copy / "ALCF").mkdir(parents=True)
    for name in ("train_alcf.sh", "ALCF/helpers.sh"):
        shutil.copy(ROOT / name, copy / name)
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron", copy / "megatron", ignore=hidden)
    (copy / "requirements.txt").write_text("", encoding="utf-8")
    (copy / "pretrain_gpt_alcf.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "from megatron.launch.starts import accept, is_accepted\n"
        "config = Path(sys.argv[2])\n"
        "if os.environ['RANK'] == '0':\n    accept(config, config.parents[1])\n"
        "while not is_accepted(config):\n    time.sleep(0.02)\n"
        "print('trained on', os.environ['WORLD_SIZE'])\n"
        "sys.exit(int(os.environ.get('END', 0)))\n",
        encoding="utf-8",
    )
    return copy


def stand_ins(folder: Path, *names: str) -> str:
    """A PYTHONPATH with empty packages of these names."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("environ", "status", "word"),
    [
        ({"TP": "3", "HEADS": "8", "HIDDEN": "64"}, 2, "TP=3"),
        ({"NLAYERS": "abc"}, 2, "NLAYERS=abc"),
        ({"DATA_FILE_LIST": "missing.txt"}, 3, "DATA_FILE_LIST"),
    ],
)
def test_a_wrong_variable_is_refused_within_a_second(
    project: Path, environ: dict[str, str], status: int, word: str
) -> None:
    """The best of some: other work on the machine is not this script's."""
    times = [math.inf]
    while min(times) >= 1 and len(times) < 6:
        began = time.monotonic()
        found = run(project, script=project / "train_alcf.sh", **environ)
        times.append(time.monotonic() - began)
        assert found.returncode == status
        assert word in found.stderr
        assert "Traceback" not in found.stderr
    assert min(times) < 1, times
    assert not (project / "runs").exists()
    assert not (project / ".venv").exists()


def test_dry_run_and_help_need_no_environment(project: Path, tmp_path: Path) -> None:
    # An environment that has all would hide a start after the check: its plan would show twice.
    packages = stand_ins(tmp_path / "packages", "torch", "deepspeed")
    found = run(project, script=project / "train_alcf.sh", DRY_RUN="1", PYTHONPATH=packages)
    assert found.returncode == 0
    assert found.stdout.count("Dry run: nothing was started.") == 1
    found = run(project, "--help", script=project / "train_alcf.sh")
    assert found.returncode == 0
    assert "--num-layers" in found.stdout
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("end", [0, 5])
def test_the_trainings_status_is_the_scripts(project: Path, tmp_path: Path, end: int) -> None:
    packages = stand_ins(tmp_path / "packages", "torch", "deepspeed")
    found = run(
        project,
        "--run-dir",
        "mine",
        script=project / "train_alcf.sh",
        PYTHONPATH=packages,
        END=str(end),
        TP="2",
    )
    assert found.returncode == end, found.stderr
    assert "trained on 2" in found.stdout
    assert "trained on 2" in (project / "mine" / "output.log").read_text(encoding="utf-8")
    assert not (project / ".venv").exists()


def test_a_variable_that_was_meant_is_named_first_and_last_and_refused_in_a_job(
    project: Path, tmp_path: Path
) -> None:
    packages = stand_ins(tmp_path / "packages", "torch", "deepspeed")
    environ = {"PYTHONPATH": packages, "LEARNING_RATE": "1"}
    found = run(project, script=project / "train_alcf.sh", **environ)
    said = "WARNING: LEARNING_RATE=1 has no effect: the variable is called LR"
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and lines[-1].endswith(said), found.stdout
    assert lines.index(said) < lines.index("trained on 1") < len(lines) - 1
    (project / "nodes").write_text("n1\n", encoding="utf-8")
    job = {"PBS_JOBID": "1", "PBS_NODEFILE": "nodes"}
    refused = run(project, script=project / "train_alcf.sh", **environ, **job)
    assert refused.returncode == 2 and "IGNORE_VARIABLES=LEARNING_RATE" in refused.stderr
    assert "trained" not in refused.stdout


def test_it_works_from_elsewhere_and_as_a_schedulers_copy(project: Path, tmp_path: Path) -> None:
    packages = stand_ins(tmp_path / "packages", "torch", "deepspeed")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = run(elsewhere, script=project / "train_alcf.sh", PYTHONPATH=packages)
    assert found.returncode == 0, found.stderr
    assert f"working in {project}" in found.stdout
    assert (project / "runs" / "debug-seq128-builtin" / "run.json").exists()

    spooled = shutil.copy(project / "train_alcf.sh", elsewhere / "123.server.SC")
    for variable in ("PBS_O_WORKDIR", "SLURM_SUBMIT_DIR"):
        found = run(elsewhere, script=Path(spooled), DRY_RUN="1", **{variable: str(project)})
        assert found.returncode == 0, found.stderr
    found = run(elsewhere, script=Path(spooled), DRY_RUN="1")
    assert found.returncode == 2
    assert "project's folder" in found.stderr


def test_debug_shows_the_commands(project: Path) -> None:
    assert (
        "+ find_python"
        in run(project, script=project / "train_alcf.sh", DRY_RUN="1", DEBUG="1").stderr
    )
    assert "+ " not in run(project, script=project / "train_alcf.sh", DRY_RUN="1", DEBUG="0").stderr


@pytest.mark.long
def test_an_environment_is_made_once_and_completed_when_outdated(
    project: Path, tmp_path: Path
) -> None:
    """Without torch in the active environment, `.venv` is made from the requirements.

    These name no packages, and so each start ends with torch missing.
    """
    bare = tmp_path / "bin"
    bare.mkdir()
    for name in SHELL_TOOLS:
        where = shutil.which(name)
        if where:
            (bare / name).symlink_to(where)
    plain = Path(sys._base_executable)  # type: ignore[attr-defined]
    (bare / "python3").write_text(f'#!/bin/bash\nexec "{plain}" "$@"\n', encoding="utf-8")
    (bare / "python3").chmod(0o755)
    environ = {"PATH": str(bare), "HOME": str(tmp_path), "PIP_NO_INDEX": "1"}

    def train() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "train_alcf.sh"],
            cwd=project,
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    first, second = train(), train()
    assert first.returncode == 2, first.stderr
    assert "torch is not installed" in first.stderr
    assert "making the Python environment .venv from requirements.txt" in first.stdout
    assert "the environment is made (" in first.stdout
    assert second.returncode == 2
    assert "making" not in second.stdout
    assert not (project / ".venv.lock").exists()

    (project / "requirements.txt").write_text("no-such-package==1\n", encoding="utf-8")
    third = train()
    assert third.returncode == 1
    assert "no-such-package" in third.stderr
    assert "the Python environment could not be made" in third.stderr
    assert not (project / ".venv.lock").exists()

    (project / "requirements.txt").write_text("# changed\n", encoding="utf-8")
    (project / ".venv.lock").mkdir()
    (project / ".venv.lock" / "owner").write_text(
        f"{os.uname().nodename} 999999999\n", encoding="utf-8"
    )
    fourth = train()
    assert fourth.returncode == 2, fourth.stderr
    assert "making the Python environment" in fourth.stdout
