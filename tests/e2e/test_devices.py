"""A host that should have accelerators and shows none is refused, by real ranks, before step 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PERLMUTTER = {"NERSC_HOST": "perlmutter", "LAUNCH_WITH": "local", "NGPU_PER_HOST": "2"}
SMALL = {
    "MODEL_ARCH": "debug", "NLAYERS": "2", "HIDDEN": "32", "HEADS": "4", "NUM_KV_HEAD": "2",
    "FFN_HIDDEN_SIZE": "64", "SEQ": "32", "MICRO_BATCH": "1", "GRAD_ACC_STEPS": "1",
    "TRAIN_ITERS": "2", "EVAL_INTERVAL": "0", "DATA_FILE_LIST": "builtin", "WANDB_MODE": "disabled",
    "TOKENIZER_TYPE": "BuiltinTokenizer", "WORLD_SIZE": "2", "DTYPE": "fp32", "TP": "1",
}  # fmt: skip

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="has one"),
]


def start(folder: Path, *command: str, **variables: str) -> tuple[int, str]:
    """Status and output of a start with variables beside SMALL."""
    own = {name: text for name, text in os.environ.items() if name != "DS_ACCELERATOR"}
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**own, **SMALL, "RUN_DIR": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_gpu_node_that_shows_none_is_refused_unless_told(tmp_path: Path) -> None:
    status, output = start(tmp_path, "-m", "megatron.launch.start", **PERLMUTTER)
    assert status == 2
    assert "a host of perlmutter has 4 accelerators, but torch sees no such device" in output
    assert "DEVICE=cpu trains on the CPU" in output
    assert not (tmp_path / "run.json").exists() and not (tmp_path / "metrics.jsonl").exists()

    status, output = start(tmp_path, "-m", "megatron.launch.start", **PERLMUTTER, DEVICE="cpu")
    assert status == 0, output[-2000:]
    assert "iteration=       2/       2" in output


def test_an_accelerator_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    status, output = start(tmp_path, "-m", "megatron.launch.start", DEVICE="cuda", WORLD_SIZE="1")
    assert (status, "DEVICE=cuda is set, but torch sees" in output) == (2, True)


def test_ranks_of_another_launcher_are_refused_too(tmp_path: Path) -> None:
    """DeepSpeed would compute on another kind of device than the rank."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cuda"}
    status, output = start(tmp_path, "pretrain_gpt_alcf.py", **rank)
    assert status == 2
    assert "this rank computes on cpu, but DeepSpeed has chosen cuda" in output
