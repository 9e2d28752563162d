"""The ends of the tested range compute what the pinned versions do; they come from a registry.

All of it by hand, of versions V: `python3 -m pip install --no-deps --target FOLDER deepspeed==V`,
then `PYTHONPATH=FOLDER python3 -m tests.engine.curves`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.launch.versions import SINCE, TESTED, numbers
from tests.engine.curves import CASES, curves

ROOT = Path(__file__).resolve().parents[2]
NORM = 2e-7
"""Relative; before 0.19.8, bf16's optimizer sums the squares of a norm in another order."""


def installed(folder: Path, package: str) -> None:
    """A package by itself, as it is on no path but the one it is given."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--target", str(folder), package],
        env={**os.environ, "DS_BUILD_OPS": "0"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"{package} cannot be had here: {done.stderr[-300:]}")


def under(folder: Path, *module: str) -> subprocess.CompletedProcess[str]:
    """A module run with the package of that folder before all others."""
    return subprocess.run(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.long
def test_the_oldest_deepspeed_computes_the_same(tmp_path: Path) -> None:
    """All layouts of `curves`, losses equal in every digit."""
    oldest = TESTED["deepspeed"].oldest
    installed(tmp_path, f"deepspeed=={oldest}")
    done = under(tmp_path, "tests.engine.curves")
    assert done.returncode == 0, done.stderr
    theirs: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert theirs["versions"]["deepspeed"] == oldest
    ours: dict[str, Any] = json.loads(json.dumps(curves(list(CASES))))
    for name, curve in ours.items():
        other = theirs["curves"][name]
        if name in SINCE and numbers(oldest) < numbers(SINCE[name][1]):
            assert f"needs deepspeed {SINCE[name][1]}" in other
            continue
        assert [loss for loss, _ in other] == [loss for loss, _ in curve], name
        assert [norm for _, norm in other] == pytest.approx([n for _, n in curve], rel=NORM), name
    # What it would apply, were it not for engine/older.py: gradients that are not finite.
    names = " or ".join(
        f"none[{name}]" for name in ("deepspeed", "zero3", "deepspeed-bf16", "fp16", "pp2")
    )
    gate = under(tmp_path, "pytest", "-q", "-m", "", "tests/engine/test_gate.py", "-k", names)
    assert gate.returncode == 0 and "5 passed" in gate.stdout, gate.stdout
