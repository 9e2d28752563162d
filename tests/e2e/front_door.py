"""Runs train_alcf.sh as a user does, in the environment that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "NLAYERS": "4", "HIDDEN": "32", "HEADS": "4", "NUM_KV_HEAD": "2", "FFN_HIDDEN_SIZE": "48",
    "SEQ": "32", "DTYPE": "fp32", "MICRO_BATCH": "2", "GAS": "2", "TRAIN_ITERS": "4",
    "EVAL_ITERS": "2", "NO_TENSORBOARD": "1", "WANDB_MODE": "disabled",
}  # fmt: skip


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Only what a login shell has, the tests' interpreter, and the variables."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **variables}


def command(*flags: str) -> list[str]:
    """The command line."""
    return ["bash", str(ROOT / "train_alcf.sh"), *flags]


def train(
    variables: Mapping[str, str], *flags: str, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """A tiny run to its end."""
    return subprocess.run(
        command(*flags),
        env=environment({**TINY, **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of tools/."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        env=environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
