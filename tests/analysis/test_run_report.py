"""report.md from a run's folder."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from megatron.analysis.recorded_run import read_folder, recorded
from megatron.analysis.run_report import report, write_report
from megatron.training import metrics_file
from tests.training import records_factory as make
from tests.training.run_config import tiny_run

RECORDS = [
    make.step(1, 4.0),
    make.evaluation(1, 3.5),
    *(make.step(i, 4.0 - 0.1 * i) for i in range(2, 11)),
    make.skip(11),
    make.skip(12),
    make.skip(20),
    make.step(21, 1.5, nan_iterations=2),
    make.evaluation(21, 1.25),
    {"event": "stop", "iteration": 21, "train_iters": 100, "reason": "signal SIGTERM"},
]


def run_json(folder: Path) -> dict[str, object]:
    run = tiny_run(folder)
    data = dataclasses.replace(run.data, train_range_to_skip="11-12,20-20")
    return {
        **dataclasses.replace(run, data=data).to_dict(),
        "provenance": {"commit": "abc123", "versions": {"torch": "2.13.0"}},
    }


def test_the_report_tells_what_happened(tmp_path: Path) -> None:
    text = report(recorded(run_json(tmp_path), RECORDS, "debug"))
    for words in (
        "# debug\n",
        "Loss 4.0000 at step 1, 1.5000 at step 21 of 100; 672 tokens; 0:00:20 from first to last.",
        "Last validation loss 1.2500, perplexity 12.18, accuracy 43.75%, at step 21 over 80",
        "The loss was not finite in 2 steps.",
        "Stopped at step 21: signal SIGTERM.",
        "| tokens/s | 64.0 |",
        "| steps/s | 2 |",
        "| samples/s | 8 |",
        "| samples per step | 4 |",
        "| tokens per step | 32 |",
        "| FLOPs (LM), all logged steps | 3.3e+13 |",  # 11 steps of 0.5 s at 3 TFLOPS on 2 devices
        "| tokens/s per device | 32.0 on 2 |",
        "| MFU, last line | peak unknown |",
        "| step, 10% / median / 90% | 0.500 / 0.500 / 0.500 s |",
        "| TP | 1 |",
        "| layers | 3 |",
        "| precision | fp32 |",
        "| asked for | 11-12,20-20 |",
        "| logged as skipped | 11-12,20-20 |",
        "| commit | abc123 |",
        "| versions.torch | 2.13.0 |",
    ):
        assert words in text, words
    assert len(text.splitlines()) < 90


def test_a_run_without_work_has_a_report(tmp_path: Path) -> None:
    text = report(recorded(run_json(tmp_path), [make.skip(1)], "debug"))
    assert "No step did work." in text
    assert "Throughput" not in text


def test_it_is_written_beside_the_run_with_a_plot(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(run_json(tmp_path)))
    lines = [metrics_file.encode(r) for r in [*RECORDS, make.step(22, math.nan)]]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_url").write_text("https://wandb.ai/a/b/runs/c\n")
    for _ in range(2):  # a second start writes over it
        path = write_report(read_folder(tmp_path), tmp_path)
    assert path == tmp_path / "report.md"
    assert "nan at step 22" in path.read_text()
    assert "| wandb | https://wandb.ai/a/b/runs/c |" in path.read_text()
    plot = (tmp_path / "plots" / "loss.txt").read_text()
    assert all(len(line) <= 80 for line in plot.splitlines())
    assert not list(tmp_path.glob("*.new"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"run\.json"):
        read_folder(tmp_path)
