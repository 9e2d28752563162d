"""A checkpoint on disk is a promise: one that an older version wrote resumes, in any layout.

written_before/ was written by the first version of the format (TP=2, DP=2, ZeRO-1, adamw, fp32),
with the losses and gradient norms of the three steps that its writer took next.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron.training.metrics_file import read
from tests.e2e.front_door import train

WRITTEN = Path(__file__).parent / "written_before"
NEXT = [
    (3.50877046585083, 1.3018683195114136),
    (3.5287508964538574, 1.3651635646820068),
    (3.42635440826416, 1.209006667137146),
]
SETTINGS = {
    "TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": "60", "MODEL_ARCH": "debug", "NLAYERS": "2",
    "HIDDEN": "16", "HEADS": "4", "NUM_KV_HEAD": "2", "FFN_HIDDEN_SIZE": "32", "SEQ": "16",
    "TRAIN_ITERS": "6", "EVAL_INTERVAL": "0", "LR": "0.01", "LR_WARMUP_FRAC": "0", "COMPILE": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            {"TP": "2", "WORLD_SIZE": "4", "MICRO_BATCH": "2", "GAS": "2"}, marks=pytest.mark.long
        ),
        {"MICRO_BATCH": "2", "GAS": "4"},
        pytest.param({"PP": "2", "MICRO_BATCH": "2", "GAS": "4"}, marks=pytest.mark.long),
    ],
    ids=["as written", "one process", "pipeline"],
)
def test_it_resumes(layout: dict[str, str], tmp_path: Path) -> None:
    for file in WRITTEN.glob("numbers.*"):
        shutil.copy(file, tmp_path)
    shutil.copytree(WRITTEN / "step-00000003", tmp_path / "run/checkpoints/step-00000003")
    (tmp_path / "list.txt").write_text(f"1 {tmp_path}/numbers numbers\n")
    folders = {"RUN_DIR": f"{tmp_path}/run", "DATA_FILE_LIST": f"{tmp_path}/list.txt"}
    done = train({**SETTINGS, **layout, **folders})
    assert done.returncode == 0, done.stdout
    steps = [r for r in read(tmp_path / "run/metrics.jsonl") if r["event"] == "step"]
    assert [step["iteration"] for step in steps] == [4, 5, 6]
    curve = [(step["loss"], step["grad_norm"]) for step in steps]
    for (loss, norm), (a, b) in zip(curve, NEXT, strict=True):
        # The last digits are the processor's.
        assert loss == pytest.approx(a, abs=2e-6) and norm == pytest.approx(b, abs=2e-6)
