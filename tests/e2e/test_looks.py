"""Evaluations and sampled texts of whole runs: the same in every layout, and no step sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config.errors import DataError
from megatron.data.indexed import IndexedWriter
from tests.e2e.recorded import VOCAB_SIZE, train_recorded, write_data
from tests.spawn import RankError, run
from tools import evaluate

LOOKS = {
    "EVAL_INTERVAL": "4", "EVAL_ITERS": "3", "SAMPLE_INTERVAL": "3", "SAMPLE_PROMPT": "5 17 98",
    "TRAIN_ITERS": "6", "LR_DECAY_ITERS": "6", "TEST_SPLIT": "10",
}  # fmt: skip


def held_out(folder: Path) -> Path:
    """A list of one small file whose tokens are not those of the training data."""
    with IndexedWriter(str(folder / "held"), np.dtype(np.uint16)) as writer:
        for start in range(10):
            writer.add_document(np.arange(start, start + 40) % (VOCAB_SIZE - 1))
    path = folder / "held.txt"
    path.write_text(f"1 {folder / 'held'} held\n")
    return path


def records(folder: Path, variables: dict[str, str], ranks: int = 1) -> list[dict[str, Any]]:
    """What a run adds to metrics.jsonl."""
    path = folder / "metrics.jsonl"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    results = run(train_recorded, ranks, variables | {"RUN_DIR": str(folder)}, timeout=150)
    assert [result.status for result in results] == [0] * ranks
    return [json.loads(line) for line in path.read_text().splitlines()[before:]]


def of(found: list[dict[str, Any]], event: str, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(one[name] for name in names) for one in found if one["event"] == event]


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({"TP": "2", "SEQUENCE_PARALLEL": "1"}, 2),
        ({"PP": "2", "DATA_ORDER": "megatron"}, 2),
        ({"SP": "2"}, 2),
        ({"WORLD_SIZE": "2", "ZERO_STAGE": "3"}, 2),
        (
            {
                "PP": "2",
                "GAS": "4",
                "MICRO_BATCH": "2",
                "PIPELINE_SCHEDULE": "dualpipev",
                "NLAYERS": "4",
            },
            2,
        ),
    ],
    ids=str,
)
def test_every_layout_sees_the_same(layout: dict[str, str], ranks: int, tmp_path: Path) -> None:
    """And one without evaluation and samples takes the same steps, to the last bit."""
    own = {name: layout[name] for name in ("DATA_ORDER", "NLAYERS") if name in layout}
    data = {"DATA_FILE_LIST": str(write_data(tmp_path))} | own
    looks = {**LOOKS, **data, "VALID_DATA_FILE_LIST": str(held_out(tmp_path))}
    want = records(tmp_path / "one", looks)
    got = records(tmp_path / "many", looks | layout, ranks)
    plain = {**data, "TRAIN_ITERS": "6", "LR_DECAY_ITERS": "6", "TEST_SPLIT": "10"}
    bare = records(tmp_path / "bare", plain | layout, ranks)
    steps = of(got, "step", "iteration", "loss", "grad_norm")
    assert steps == of(bare, "step", "iteration", "loss", "grad_norm")
    for ours, theirs in zip(of(want, "eval", "loss"), of(got, "eval", "loss"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    names = ("iteration", "split", "accuracy", "samples")
    assert of(want, "eval", *names) == of(got, "eval", *names)
    assert [row[:2] for row in of(got, "eval", *names)] == [
        (4, "validation"), (6, "validation"), (6, "test"),
    ]  # fmt: skip
    texts = of(got, "sample", "iteration", "prompt", "text")
    assert [row[:2] for row in texts] == [(3, "5 17 98"), (6, "5 17 98")]
    assert texts == of(want, "sample", "iteration", "prompt", "text")
    assert any(text for *_, text in texts)  # one may end at once


@pytest.mark.long
def test_own_validation_data_hold_over_resumes_and_for_the_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every evaluation reads the first samples of the list, whatever the training data is."""
    looks = {**LOOKS, "DATA_FILE_LIST": str(write_data(tmp_path)), "LR": "1e-30", "OPT": "sgd"}
    looks["VALID_DATA_FILE_LIST"] = str(held_out(tmp_path))
    losses = [
        loss
        for order, iters in (("stateless", "4"), ("stateless", "8"), ("megatron", "12"))
        for loss, split in of(
            records(
                tmp_path / "run",
                {**looks, "TRAIN_ITERS": iters, "DATA_ORDER": order, "ALLOW_DATA_CHANGE": "1"},
            ),
            "eval",
            "loss",
            "split",
        )
        if split == "validation"
    ]
    assert len(losses) == 3 and len(set(losses)) == 1
    assert evaluate.main([str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[2:] == ["held", "all"] and found["iteration"] == 12
    assert found["all"]["loss"] == pytest.approx(losses[0], abs=1e-6)
    assert evaluate.main([str(tmp_path / "run"), looks["VALID_DATA_FILE_LIST"], "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["held"]["samples"] == 24 and whole["held"]["tokens"] == 24 * 16


def test_a_limit_of_epochs_in_validation_data_is_refused(tmp_path: Path) -> None:
    own = held_out(tmp_path)
    own.write_text(own.read_text() + "corpus held max_epochs=2\n")
    variables = {
        **LOOKS,
        "DATA_FILE_LIST": str(write_data(tmp_path)),
        "RUN_DIR": str(tmp_path / "run"),
    }
    with pytest.raises(RankError, match=f"{DataError.__name__}.*VALID_DATA_FILE_LIST=.*max_epochs"):
        run(train_recorded, 1, variables | {"VALID_DATA_FILE_LIST": str(own)})
