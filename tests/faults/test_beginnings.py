"""Runs that begin with what others wrote, started as users do: FINETUNE, LOAD, an import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.schedule import learning_rate
from megatron.config.schema import read_run
from megatron.training.metrics_file import read
from tests.checkpoint import reference_checkpoint as reference
from tests.faults.conftest import Finished
from tests.faults.harness import LAYOUTS, committed, digests, losses, train
from tools import convert_hf


def step_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read(folder / "metrics.jsonl") if row["event"] == "step"]


@pytest.mark.parametrize(
    "layout", ["one", *(pytest.param(one, marks=pytest.mark.long) for one in ("tp2-pp2", "zero3"))]
)
def test_a_finetune_is_a_new_run_and_goes_on(
    layout: str, data: str, finished: Finished, tmp_path: Path
) -> None:
    source, folder = finished("one"), tmp_path / "new"
    before = digests(source)
    settings = {
        "DATA_FILE_LIST": data, "SEED": "5", "LR": "0.002", "FINETUNE": "1",
        "LOAD": str(source / "checkpoints"), "LR_DECAY_ITERS": "8", "LR_WARMUP_FRAC": "0.25",
        "SAVE_INTERVAL": "2", **LAYOUTS[layout],
    }  # fmt: skip
    ended = train(folder, TRAIN_ITERS="4", **settings)
    assert ended.status == 0, ended.output
    schedule = read_run(folder / "run.json").optimizer
    for number, row in enumerate(step_rows(folder), 1):
        assert row["iteration"] == number and row["consumed_samples"] == 8 * number
        assert row["learning_rate"] == pytest.approx(learning_rate(number, schedule))
    if layout != "one":
        serial = settings | {"TP": "", "PP": "", "ZERO_STAGE": "", **LAYOUTS["one"]}
        ended = train(tmp_path / "serial", TRAIN_ITERS="1", **serial)
        assert ended.status == 0, ended.output
        expected = losses(tmp_path / "serial")[1]
        assert losses(folder)[1] == pytest.approx(expected, abs=1e-5)
    assert losses(folder)[1] < losses(source)[1] - 0.2, "the weights are trained ones"
    again = train(folder, TRAIN_ITERS="8", **settings)
    assert again.status == 0, again.output
    assert [row["iteration"] for row in step_rows(folder)] == [*range(1, 9)]
    assert committed(folder)[-1] == 8 and digests(source) == before


@pytest.mark.long
def test_load_of_the_reference_is_refused_and_its_import_goes_on(data: str, tmp_path: Path) -> None:
    values = reference.known()
    reference.write(tmp_path / "old", reference.Written(tp=2, dp=2), values)
    shape = {
        "NLAYERS": reference.LAYERS, "HIDDEN": reference.HIDDEN, "HEADS": reference.HEADS,
        "NUM_KV_HEAD": reference.GROUPS, "FFN_HIDDEN_SIZE": reference.FFN,
        "SEQ": reference.SEQ, "VOCAB_SIZE": reference.VOCAB, "ROPE_THETA": 10000,
    }  # fmt: skip
    settings = {
        "DATA_FILE_LIST": data, "DATA_ORDER": "megatron", "TRAIN_ITERS": "8",
        **{name: str(value) for name, value in shape.items()}, **LAYOUTS["tp2"],
    }  # fmt: skip
    ended = train(tmp_path / "new", LOAD=str(tmp_path / "old"), **settings)
    assert ended.status == 4, ended.output
    assert f"python3 tools/convert_hf.py import {tmp_path / 'old'} RUN" in ended.output
    assert convert_hf.main(["import", str(tmp_path / "old"), str(tmp_path / "run")]) == 0
    ended = train(tmp_path / "run", **settings)
    assert ended.status == 0, ended.output
    rows = step_rows(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [6, 7, 8]
    assert [row["consumed_samples"] for row in rows] == [48, 56, 64]
    assert committed(tmp_path / "run") == [5, 8]
