"""LR_FINDER=1 as a user runs it: a folder of its own, a suggestion, nothing to resume."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.e2e.front_door import train


@pytest.mark.long
def test_a_search_and_a_run_that_is_refused_one(tmp_path: Path) -> None:
    found = train(
        {
            "WORLD_SIZE": "2", "LR_FINDER": "1", "TRAIN_ITERS": "12", "SAVE_INTERVAL": "2",
            "RUN_DIR": str(tmp_path / "search"),
        }
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
    assert "suggest" in found.stdout and "log10 of LR" in found.stdout
    rows = list(csv.DictReader((tmp_path / "search" / "lr_finder.csv").open()))
    assert [int(row["iteration"]) for row in rows] == list(range(1, len(rows) + 1))
    assert float(rows[0]["learning_rate"]) == pytest.approx(1e-6)
    assert not (tmp_path / "search" / "checkpoints").exists()
    run = {"RUN_DIR": str(tmp_path / "run"), "EVAL_INTERVAL": "0"}
    assert train(run).returncode == 0
    refused = train({**run, "LR_FINDER": "1"})
    assert refused.returncode == 2 and "LR_FINDER=1 searches from step 1" in refused.stdout
