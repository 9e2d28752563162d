"""Small trainings for real launchers: settings, commands, and what a run's metrics must say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron.training.metrics_file import locate, read
from tests.hosts.lab import clean_environment
from tools import compare_runs

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
BATCH = 4  # samples a step: MICRO_BATCH x DP
SEQ = 64
SMALL = {
    "NLAYERS": "2",
    "HIDDEN": "64",
    "HEADS": "4",
    "NUM_KV_HEAD": "2",
    "SEQ": str(SEQ),
    "MICRO_BATCH": "2",
    "TP": "2",
    "TRAIN_ITERS": str(STEPS),
    "EVAL_INTERVAL": "0",
    "NO_TENSORBOARD": "1",
    "WORLD_SIZE": "4",
    "NGPU_PER_HOST": "2",
}
TRAIN = ["bash", str(ROOT / "train_alcf.sh")]
PRETRAIN = [sys.executable, str(ROOT / "pretrain_gpt_alcf.py")]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """All variables of a training that writes below `folder` and nowhere else."""
    environ = {**clean_environment(), **SMALL, "VIRTUAL_ENV": sys.prefix}
    environ["PATH"] = f"{sys.prefix}/bin:{environ['PATH']}"
    return {**environ, "RUN_DIR": str(folder / "run"), **more}


def steps(run: Path) -> list[dict[str, Any]]:
    """The steps of the one run below `run`, once all of it adds up.

    One folder, one start, each step once; and the rate is that of all tokens of all ranks.
    """
    assert len(list(run.rglob("metrics.jsonl"))) == 1
    found = [record for record in read(locate(run / "run")) if record["event"] == "step"]
    assert [record["iteration"] for record in found] == list(range(1, len(found) + 1))
    for record in found:
        assert record["world_size"] == 4
        tokens = record["global_batch_size"] * record["seq_length"]
        assert tokens == record["consumed_tokens"] / record["iteration"]
        rate = record["tokens_per_s"] * record["elapsed_s"]
        assert abs(rate / tokens - 1) < 1e-6
        assert abs(record["tokens_per_gpu_per_s"] * 4 / record["tokens_per_s"] - 1) < 1e-6
    return found


def assert_same(run: Path, reference: Path) -> None:
    """Losses and gradient norms of every step, bit for bit."""
    words = [str(run / "run"), str(reference / "run"), "--assert-equal", "0"]
    assert compare_runs.main(words) == 0, run
    assert len(steps(run)) == len(steps(reference))
