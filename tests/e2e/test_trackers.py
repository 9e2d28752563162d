"""A real run with a skipped step and a resume: both dashboards have what metrics.jsonl has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron.config.schema import read_run
from megatron.training.events import points, scalars
from megatron.training.metrics_file import MetricsRecord, read
from tests.e2e.front_door import ROOT, TINY, environment
from tests.training.test_dashboards import offline_runs, read_tensorboard

ASKED = {
    **TINY, "TRAIN_ITERS": "6", "EVAL_INTERVAL": "2", "EVAL_ITERS": "1", "SAVE_INTERVAL": "2",
    "WORLD_SIZE": "2", "TRAIN_RANGE_TO_SKIP": "3 3", "WANDB_MODE": "offline", "NO_TENSORBOARD": "0",
    "LOG_PARAMS_NORM": "1", "LOG_NUM_ZEROS_IN_GRAD": "1", "LOG_OPTIMIZER_STATES": "1",
    "LOG_CORPUS_LOSS": "1", "TIMING_LOG_LEVEL": "1", "PROFILE": "torch", "PROFILE_STEPS": "2",
}  # fmt: skip
SHOWN = {
    "loss": "loss/lm loss", "grad_norm": "loss/grad_norm", "params_norm": "loss/params_norm",
    "num_zeros": "loss/num_zeros_in_grad", "learning_rate": "optimizer/learning_rate",
    "consumed_tokens": "training/consumed_tokens", "consumed_samples": "training/consumed_samples",
    "elapsed_s": "throughput/iteration-time", "tokens_per_s": "throughput/tokens_per_sec",
    "tokens_per_gpu_per_s": "throughput/tokens_per_gpu_per_sec", "tflops_lm":
    "throughput/tflops-lm", "tflops_ds": "throughput/tflops", "memory_max_gib": "memory/max_gib",
    "skipped_iterations": "training/skipped_iterations", "loss_scale": "loss/loss_scale",
    "nan_iterations": "training/nan_iterations", "samples_per_s": "throughput/samples_per_sec",
    "tflops_causal": "throughput/tflops-causal",
}  # fmt: skip
"""Key of a step's record -> its name on both dashboards."""


def start(folder: Path, **changes: str) -> str:
    """One start, and what it printed."""
    done = subprocess.run(
        ["bash", str(ROOT / "train_alcf.sh")],
        env=environment({**ASKED, "RUN_DIR": str(folder), **changes}),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_iteration(records: list[MetricsRecord], numbers: Any) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for record in records:
        rows.setdefault(record["iteration"], {}).update(numbers(record))
    return {iteration: row for iteration, row in rows.items() if row}


@pytest.mark.long
def test_dashboards_hold_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from tests.training import wandb_folder

    folder = tmp_path / "run"
    printed = start(folder, EXIT_INTERVAL="4") + start(folder)
    assert len(re.findall(r"\(min, max\) time across ranks \(ms\):\n  forward-back", printed)) == 5
    assert len(list((folder / "profile").iterdir())) == 2
    records, run = read(folder / "metrics.jsonl"), read_run(folder / "run.json")
    assert {r["event"] for r in records} == {"step", "skip", "eval", "save", "stop"}

    rows: dict[int, dict[str, Any]] = {}
    for path in offline_runs(folder):
        found = wandb_folder.history(path)
        assert not rows.keys() & found.keys()
        rows |= found
    wanted = by_iteration(records, lambda record: scalars(record, run.parameters))
    assert rows == {iteration: pytest.approx(row) for iteration, row in wanted.items()}
    curves = read_tensorboard(folder / "tensorboard")
    shown = {(name, step): value for name, curve in curves.items() for step, value in curve}
    wanted = by_iteration(records, points)
    assert shown == {
        (name, step): pytest.approx(value, rel=1e-6)
        for step, row in wanted.items()
        for name, value in row.items()
    }

    for record in (r for r in records if r["event"] == "step"):  # told apart from the tables above
        row, step = rows[record["iteration"]], record["iteration"]
        for key, name in SHOWN.items():
            assert row[name] == pytest.approx(record[key])
            assert shown[name, step] == pytest.approx(record[key], rel=1e-6)
        nested = {"timers_max": "timers/{}-time", "optimizer_states": "optimizer/{}",
                  "corpus_loss": "corpus-loss/{}"}  # fmt: skip
        for key, name in nested.items():
            assert record[key]
            for entry, value in record[key].items():
                assert row[name.format(entry)] == pytest.approx(value)
    evaluations = [r for r in records if r["event"] == "eval"]
    for record in evaluations:
        assert rows[record["iteration"]]["val/lm loss"] == pytest.approx(record["loss"])
    last = wandb_folder.summary(offline_runs(folder)[-1])
    assert last["val/best lm loss"] == min(r["loss"] for r in evaluations)
