"""A short run through `train_alcf.sh`, as a user starts it, and the steady part of its metrics.

It is a search of the learning rate (LR_FINDER=1) at rates that change nothing, because such a run
saves nothing: a checkpoint of some billions of parameters takes longer than all else.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.schema import by_variable
from tools.benchmarks.record import ROOT

WARM_UP = 4  # steps: compilation, the allocator's growth
STEPS = 10
OUT_OF_MEMORY = ("OutOfMemory", "out of memory", "not enough memory", "cannot allocate memory")
ALWAYS = {
    "LR_FINDER": "1",
    "LR": "1e-6",
    "OPT": "adamw",
    "TOKENIZER_TYPE": "NullTokenizer",
    "EVAL_INTERVAL": "0",
    "LOG_STYLE": "line",
    "NO_TENSORBOARD": "1",
    "WANDB_DISABLED": "1",
    "TRAIN_SPLIT": "1",
    "VAL_SPLIT": "0",
}


@dataclass(frozen=True)
class Short:
    """What a short run showed.

    Attributes:
        outcome: ok, out of memory, or what went wrong.
        steps: records of the steps after the warm-up, as in metrics.jsonl.
        log: the end of what it printed.
    """

    outcome: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""

    def median(self, key: str) -> float | None:
        """Of a figure of the steps; None where there is none."""
        values = [step[key] for step in self.steps if step.get(key) is not None]
        return statistics.median(values) if values else None

    @property
    def peak_gib(self) -> float | None:
        """Most memory of a device."""
        values = [step["memory_max_gib"] for step in self.steps if step.get("memory_max_gib")]
        return max(values, default=None)

    @property
    def seconds(self) -> float | None:
        """Of a step, the median."""
        return self.median("elapsed_s")


def settings(pairs: list[str]) -> tuple[dict[str, str], list[str]]:
    """`NAME=value` words -> variables, and those that are no option here."""
    given = dict(pair.split("=", 1) for pair in pairs)
    unknown = [f"{name}={value}" for name, value in given.items() if name not in by_variable()]
    return {name: value for name, value in given.items() if name in by_variable()}, unknown


def train(variables: Mapping[str, str], data: Path, limit_s: float, steps: int = STEPS) -> Short:
    """Trains some steps and returns their figures.

    Args:
        variables: of the run; VOCAB_SIZE fits the data.
        data: prefix of the data file.
        limit_s: the run is ended after this.
        steps: in all; the first WARM_UP are not measured.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        files = Path(folder, "list.txt")
        files.write_text(f"1 {data} numbers\n", encoding="utf-8")
        own = {
            "DATA_FILE_LIST": str(files),
            "RUN_DIR": str(Path(folder, "run")),
            "TRAIN_ITERS": str(steps),
        }
        status, text = _run({**ALWAYS, **own, **variables}, limit_s)
        metrics = Path(folder, "run", "metrics.jsonl")
        found = _steps(metrics) if metrics.exists() else []
    lines = text.splitlines()
    if status == 0 and len(found) > WARM_UP:
        return Short("ok", found[WARM_UP:], text)
    if any(sign in text for sign in OUT_OF_MEMORY):
        return Short("out of memory", log=text)
    last = next((line for line in reversed(lines) if "rror" in line), f"status {status}")
    return Short(last.strip()[:160], log=text)


def numbers(prefix: Path, vocab_size: int, tokens: int) -> Path:
    """Writes random tokens as a data file; returns its prefix."""
    import numpy as np

    from megatron.data.indexed import IndexedWriter, token_dtype

    generator = np.random.default_rng(0)
    with IndexedWriter(str(prefix), token_dtype(vocab_size)) as writer:
        for _ in range(8):
            writer.add_document(generator.integers(0, vocab_size - 1, tokens // 8))
    return prefix


def _steps(metrics: Path) -> list[dict[str, Any]]:
    from megatron.training import metrics_file

    return [record for record in metrics_file.read(metrics) if record["event"] == "step"]


def _run(variables: Mapping[str, str], limit_s: float) -> tuple[int, str]:
    """Status and output; the launcher and its ranks are one group of processes."""
    known = by_variable()
    kept = {name: value for name, value in os.environ.items() if name not in known}
    # A virtual environment's own interpreter is used; else the first python3 on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        ["bash", str(ROOT / "train_alcf.sh")],
        env={**kept, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit_s)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return 124, f"{text}\nerror: not done after {limit_s:.0f} s"
