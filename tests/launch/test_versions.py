"""Versions of torch and DeepSpeed: too old is refused, newer is said, the files agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.launch import versions
from megatron.launch.start import require_versions
from tests.equivalence.front import run_config

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"}


@pytest.mark.parametrize("torch", ["2.11.0", "2.11.0a0+gitf00", "2.13.0+xpu", "2.15.3"])
@pytest.mark.parametrize("deepspeed", ["0.19.3", "0.19.5+cu128", "0.19.8"])
def test_the_tested_range_is_silent(torch: str, deepspeed: str) -> None:
    assert require_versions({"torch": torch, "deepspeed": deepspeed}, run_config({})) == []


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.10.1"), ("torch", "1.13"), ("deepspeed", "0.19.2"), ("deepspeed", "0.9.5")],
)
def test_older_is_refused_by_name_with_what_to_do(package: str, version: str) -> None:
    with pytest.raises(ConfigError, match=rf"{package} {re.escape(version)} is too old") as refused:
        require_versions(GOOD | {package: version}, run_config({}))
    assert f"{versions.TESTED[package].oldest} to" in str(refused.value)
    assert f"pip install '{package}~=" in str(refused.value)


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.16.0"), ("torch", "3.0"), ("deepspeed", "0.19.9"), ("deepspeed", "0.20.0")],
)
def test_newer_is_warned_of(package: str, version: str) -> None:
    (warning,) = require_versions(GOOD | {package: version}, run_config({}))
    assert f"{package} {version} is newer" in warning


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="deepspeed is not installed"):
        require_versions(GOOD | {"deepspeed": None}, run_config({}))


def test_a_schedule_that_a_version_lacks_is_refused() -> None:
    run = run_config({"PP": "2", "GRAD_ACC_STEPS": "4", "PIPELINE_SCHEDULE": "dualpipev"})
    assert require_versions(GOOD, run) == []
    with pytest.raises(ConfigError, match=r"deepspeed 0.19.8 or later.*PIPELINE_SCHEDULE=1f1b"):
        require_versions(GOOD | {"deepspeed": "0.19.3"}, run)


def test_the_requirements_are_in_the_range() -> None:
    text = (ROOT / "requirements.txt").read_text()
    pinned = {name: re.search(rf"^{name}==(.+)$", text, re.M) for name in versions.TESTED}
    found = {name: match.group(1) if match else None for name, match in pinned.items()}
    assert versions.compare(found) == ([], [])
    assert 'map(VERSIONS["requirement"]' in (ROOT / "setup.py").read_text()
    assert versions.requirement("torch") == "torch>=2.11,<2.16"
    assert versions.requirement("deepspeed") == "deepspeed>=0.19.3,<0.19.9"


def fake_package(folder: Path, name: str, version: str) -> None:
    """A package that another interpreter takes for `name` and that cannot be imported."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / f"{name}.py").write_text("raise ImportError('an old package')\n")


def test_a_rank_refuses_before_it_imports_an_old_one(tmp_path: Path) -> None:
    """Also where another launcher has started the ranks."""
    fake_package(tmp_path, "deepspeed", "0.14.4")
    ended = subprocess.run(
        [sys.executable, "pretrain_gpt_alcf.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "error: deepspeed 0.14.4 is too old" in ended.stderr
    assert "Traceback" not in ended.stderr and "old package" not in ended.stderr
