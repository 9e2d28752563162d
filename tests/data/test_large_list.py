"""A trillion tokens in 2,419 files: a rank starts at once and stays small."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.large_list import write_large_list

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_start_and_memory_of_a_rank(tmp_path: Path) -> None:
    path = write_large_list(tmp_path)
    found = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-m", "tests.data.large_list", str(path)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=200, check=True,
        )  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0]["tokens"] > 0.99e12
    # Processor time: the machine that runs the tests may be shared.
    assert min(run["cpu_seconds"] for run in found) < 2
    assert max(run["growth_mb"] for run in found) < 200
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert max(run["descriptors"] for run in found) < max(soft * 0.6, 100)
