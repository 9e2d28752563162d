"""What only an accelerator runs: its backend, streams, fused and compiled kernels, its memory.

Every case is a process on the first GPU, held to the same training on the CPU. The last test holds
the machinery itself, on any machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.plan.memory import memory_per_rank
from tests.e2e import front_door
from tests.e2e.gpu_curve import SMALL
from tools.benchmarks.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
STEPS = 5
KEPT = ("PYTHONPATH", "LD_LIBRARY_PATH")  # of a machine whose packages lie beside its torch
CLOSE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Largest difference of a loss: matrix products of another order, in another precision."""

CASES: Mapping[str, Mapping[str, str]] = {
    "nccl, streams, fused AdamW": {},
    "compiled by Triton": {"COMPILE": "1"},
    "bf16": {"DTYPE": "bf16"},
    "bf16, compiled": {"DTYPE": "bf16", "COMPILE": "1"},
    "fp16": {"DTYPE": "fp16"},
    "zero 2": {"ZERO_STAGE": "2"},
    "zero 3, compiled": {"ZERO_STAGE": "3", "COMPILE": "1"},
    "states on the host": {"ZERO_STAGE": "2", "CPU_OPTIMIZER": "1"},
    "recomputed, compiled": {"USE_ACTIVATION_CHECKPOINTING": "1", "COMPILE": "1"},
    "selective": {"USE_ACTIVATION_CHECKPOINTING": "selective"},
    "documents, FlexAttention": {"RESET_ATTENTION_MASK": "1", "RESET_POSITION_IDS": "1"},
    "documents, their loss": {"EOD_MASK_LOSS": "1", "DTYPE": "bf16"},
    "whole matrices": {"OPT": "muon"},
    "plain attention": {"NO_FLASH_ATTN": "1"},
}
ON_CPU = ("DEVICE", "COMPILE", "CPU_OPTIMIZER", "ZERO_STAGE", "USE_ACTIVATION_CHECKPOINTING")
"""Left out of the CPU's run: they change no number."""


Variables = tuple[tuple[str, str], ...]
POOL = ThreadPoolExecutor(4)


@cache
def started(variables: Variables, steps: int = STEPS) -> Future[dict[str, Any]]:
    """A process of its own, up to four at a time: most of it is imports and compilation."""
    return POOL.submit(trained, variables, steps)


@pytest.fixture(scope="module", autouse=True)
def all_started() -> None:
    """Where there is a GPU, all cases begin before the first is asked for."""
    if torch.cuda.is_available():
        for variables in CASES.values():
            for device in ("cuda", "cpu"):
                started(key(device, variables))


def trained(variables: Variables, steps: int) -> dict[str, Any]:
    """The result of `gpu_curve`."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.e2e.gpu_curve", json.dumps(dict(variables)), str(steps)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def key(device: str, variables: Mapping[str, str]) -> Variables:
    """On a device; what does not matter on the CPU is left out there."""
    kept = {k: v for k, v in variables.items() if device != "cpu" or k not in ON_CPU}
    return tuple(sorted({**kept, "DEVICE": device}.items()))


def on(device: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """The curve on a device."""
    return started(key(device, variables)).result()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_trains_as_the_cpu(name: str) -> None:
    here, there = on("cuda", CASES[name]), on("cpu", CASES[name])
    limit = CLOSE[CASES[name].get("DTYPE", "fp32")]
    assert here["losses"] == pytest.approx(there["losses"], abs=limit)
    assert here["norms"] == pytest.approx(there["norms"], rel=10 * limit)
    assert (here["scale"] > 1) is (CASES[name].get("DTYPE") == "fp16")


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("checkpointing", ["0", "1"])
def test_the_estimate_is_the_peak_of_the_device(checkpointing: str) -> None:
    variables = {
        **{"NLAYERS": "8", "HIDDEN": "1024", "HEADS": "8", "NUM_KV_HEAD": "4", "SEQ": "2048"},
        **{"FFN_HIDDEN_SIZE": "2816", "VOCAB_SIZE": "32768", "DTYPE": "bf16", "DEVICE": "cuda"},
        "USE_ACTIVATION_CHECKPOINTING": checkpointing,
    }
    peak = trained(tuple(sorted(variables.items())), 3)["peak"]  # alone on the device
    run = Workload({**SMALL, **variables}, "bf16").run()
    assert memory_per_rank(run).total == pytest.approx(peak, rel=0.1)


@pytest.mark.gpu
@NEEDS_GPU
def test_a_run_of_the_gpu_is_saved_and_resumed(tmp_path: Path) -> None:
    """By the front door: the default is the accelerator, bf16, compiled."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    whole = {**kept, "RUN_DIR": str(tmp_path / "whole"), "DTYPE": "bf16", "TRAIN_ITERS": "6"}
    halves = {**whole, "RUN_DIR": str(tmp_path / "halves"), "SAVE_INTERVAL": "3"}
    for variables in (whole, {**halves, "EXIT_INTERVAL": "3"}, halves):
        result = front_door.train(variables)
        assert result.returncode == 0, result.stdout[-3000:]
    losses = [
        [record["loss"] for record in map(json.loads, path.open()) if record["event"] == "step"]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "halves/metrics.jsonl")
    ]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert json.loads((tmp_path / "whole/run.json").read_text())


@pytest.mark.long
def test_the_cases_are_settings_of_this_version() -> None:
    """Without a GPU: every case resolves, and the CPU's curve is a curve."""
    for variables in CASES.values():
        Workload({**SMALL, **variables}, variables.get("DTYPE", "fp32")).run()
    found = on("cpu", CASES["documents, FlexAttention"])
    assert len(found["losses"]) == STEPS
    assert found["losses"][-1] < found["losses"][0]
    assert found["losses"] != on("cpu", {})["losses"], "documents are apart"
