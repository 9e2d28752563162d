"""Two rows of a sweep, typed one after the other, never land in one folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.schema import read_run
from megatron.training.metrics_file import read
from tests.e2e.front_door import ROOT, TINY, environment

SWEEP = {**TINY, "TRAIN_ITERS": "2", "EVAL_INTERVAL": "0", "SAVE_INTERVAL": "0"}
NAME = "debug-hidden32-ffn48-seq32-builtin"


def row(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """One row, in `folder`."""
    for path in ROOT.iterdir():  # the script runs in the folder that it lies in
        if path.name != "runs" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return subprocess.run(
        ["bash", str(folder / "train_alcf.sh")],
        env=environment({**SWEEP, **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


@pytest.mark.long
def test_rows_of_a_sweep(tmp_path: Path) -> None:
    """The integers are in the name; the batch is not, so its row is refused, with the way on."""
    runs = tmp_path / "runs"
    assert row(tmp_path).returncode == 0
    assert row(tmp_path, NLAYERS="2").returncode == 0
    refused = row(tmp_path, GAS="4")
    assert refused.returncode == 2
    assert "GAS 2 -> 4, GLOBAL_BATCH 4 -> 8" in refused.stdout
    assert f"RUN_NAME={NAME}-gas4" in refused.stdout
    assert row(tmp_path, GAS="4", RUN_NAME=f"{NAME}-gas4").returncode == 0

    folders = {path.name: path for path in runs.iterdir()}
    names = {NAME, NAME.replace("debug", "debug-nLayers2"), f"{NAME}-gas4"}
    assert folders.keys() - {"data-cache"} == names
    for name in names:
        steps = [
            x["iteration"] for x in read(folders[name] / "metrics.jsonl") if x["event"] == "step"
        ]
        assert steps == [1, 2]
    assert read_run(folders[NAME] / "run.json").train.global_batch_size == 4


@pytest.mark.long
def test_the_tool_trains_a_grid_once(tmp_path: Path) -> None:
    """Rows by tools/sweep.py: their figures in one table; a second start takes no step."""
    words = [sys.executable, str(ROOT / "tools/sweep.py"), "GAS=1,2", "--runs", str(tmp_path)]
    environ = environment({**SWEEP, "EVAL_INTERVAL": "2"})
    del environ["GAS"]
    for said in ("finished, ", "finished, before"):
        done = subprocess.run(
            [*words, "--format", "json"], env=environ, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(said) == 2
        rows = json.loads(done.stdout[done.stdout.index("{\n") :])["rows"]
        assert [(r["run"], r["GBS"], r["steps"]) for r in rows] == [("GAS1", 2, 2), ("GAS2", 4, 2)]
        assert all(row["best val"] > 0 and row["tokens/s"] > 0 for row in rows)
