"""Folders of runs with something of everything, for the tests of what is drawn of them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

from megatron.training import metrics_file
from tests.training import records_factory as make
from tests.training.run_config import tiny_run

STEPS = 150


def records(seed: int = 0) -> list[dict[str, Any]]:
    """Steps with corpora and phases, evaluations, a spike, skipped steps, an end."""
    noise = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(1, STEPS + 1):
        if 60 <= i <= 70:
            rows.append(make.skip(i))
            continue
        loss = 2.0 + 6.0 * math.exp(-i / 40) + noise.gauss(0, 0.1) + 2.0 * (i == 100)
        elapsed = 0.5 + noise.random() / 10
        rows.append(
            make.step(
                i, loss, elapsed_s=elapsed, train_iters=STEPS,
                learning_rate=1e-3 * math.cos(i / STEPS), grad_norm=2 ** noise.gauss(0, 2),
                corpus_loss={"code": loss - 0.5, "prose & <verse>": loss + 0.5},
                timers_max={"forward-backward": 0.4, "forward": 0.15, "backward": 0.25,
                            "optimizer": 0.05},
            )
        )  # fmt: skip
        if i == 100:
            rows.append({"event": "spike", "iteration": i, "loss": loss, "grad_norm": 9.0,
                         "z_loss": 12.0, "z_grad_norm": None, "action": "warn",
                         "report": "spikes/step-100.json"})  # fmt: skip
        if i % 50 == 0:
            rows.append(make.evaluation(i, loss - 0.2))
    return [*rows, {"event": "stop", "iteration": STEPS, "reason": "finished"}]


def write(folder: Path, seed: int = 0, **parallel: int) -> Path:
    """A run's folder; `parallel` changes its layout."""
    run = tiny_run(folder)
    run = dataclasses.replace(
        run,
        parallel=dataclasses.replace(run.parallel, **parallel),  # type: ignore[arg-type]
        data=dataclasses.replace(run.data, train_range_to_skip="60-70"),
    )
    provenance = {"commit": "abc123", "command_line": ["--note", "<script>alert(1)</script>"]}
    written = {"config": run.to_dict(), "sources": [], "provenance": provenance}
    columns = ["corpus", "prefix", "tokens", "dtype", "weight", "max_epochs"]
    files = [["code", "a", 1000, "uint16", 3.0, None], ["code", "b", 500, "uint16", 3.0, None],
             ["prose & <verse>", "c", 700, "uint16", 4.0, None]]  # fmt: skip
    stages = [{"start_tokens": 0, "list": "x", "files": files}]
    checkpoint = folder / "checkpoints" / "step-00000150"
    checkpoint.mkdir(parents=True)
    data = [{"iteration": 0, "record": {"columns": columns, "stages": stages}}]
    (checkpoint / "data.json").write_text(json.dumps(data))
    (folder / "run.json").write_text(json.dumps(written))
    lines = "".join(f"{metrics_file.encode(record)}\n" for record in records(seed))
    (folder / "metrics.jsonl").write_text(lines)
    return folder
