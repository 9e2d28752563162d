"""Runs that follow documents, from a list to metrics.jsonl: every layout logs the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.config.errors import DataError
from megatron.data.indexed import IndexedWriter
from megatron.training import saved_model
from megatron.training.saved_model import WholeModel, find
from tests.e2e.recorded import VOCAB_SIZE, train_recorded
from tests.spawn import RankError, run

EOD = VOCAB_SIZE - 1  # NullTokenizer's
OPTIONS = {
    "RESET_ATTENTION_MASK": "1", "RESET_POSITION_IDS": "1", "EOD_MASK_LOSS": "1",
    "LOG_CORPUS_LOSS": "1", "NLAYERS": "3", "TRAIN_ITERS": "4", "EVAL_INTERVAL": "2",
    "EVAL_ITERS": "2", "TRAIN_SPLIT": "800", "VAL_SPLIT": "200",
}  # fmt: skip


def write_data(folder: Path, eod: int = EOD) -> Path:
    """Two corpora of short documents, one of them with more ends in it."""
    rng = np.random.default_rng(3)
    lines = []
    for name, longest in (("a", 6), ("b", 30)):
        with IndexedWriter(str(folder / name), np.dtype(np.uint16)) as writer:
            for _ in range(6000 // longest):
                ids = rng.integers(0, EOD - 1, rng.integers(1, longest))
                writer.add_document([*ids, eod])
        lines.append(f"1 {folder / name} {name}\n")
    (folder / "list.txt").write_text("".join(lines))
    return folder / "list.txt"


def logged(folder: Path, data: Path, layout: dict[str, str], ranks: int) -> list[dict[str, Any]]:
    """The records of steps and evaluations."""
    variables = {**OPTIONS, **layout, "DATA_FILE_LIST": str(data), "RUN_DIR": str(folder)}
    results = run(train_recorded, ranks, variables, timeout=120)
    assert [result.status for result in results] == [0] * ranks
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] in ("step", "eval")]


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({"PP": "3", "USE_ACTIVATION_CHECKPOINTING": "1"}, 3),  # the stage between reads too
        ({"WORLD_SIZE": "2", "SP": "2"}, 2),
        ({"WORLD_SIZE": "4", "ZERO_STAGE": "2", "MICRO_BATCH": "1"}, 4),
    ],
    ids=str,
)
def test_every_layout_logs_the_same(layout: dict[str, str], ranks: int, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    want = logged(tmp_path / "one", data, {}, 1)
    got = logged(tmp_path / "many", data, layout, ranks)
    assert len(want) == len(got) == 4 + 2
    for one, many in zip(want, got, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
        if one["event"] == "eval":  # tokens that do not count are no misses either
            assert many["accuracy"] == one["accuracy"]
        if one["event"] == "step":
            assert many["grad_norm"] == pytest.approx(one["grad_norm"], abs=1e-5)
            assert many["corpus_loss"] == pytest.approx(one["corpus_loss"], abs=1e-5)


@pytest.mark.long
def test_the_loss_of_a_sample_is_that_of_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(tmp_path / "run", write_data(tmp_path), {"TRAIN_ITERS": "1", "EVAL_INTERVAL": "0"}, 1)
    folder = tmp_path / "run/checkpoints/step-00000001"
    sample = torch.randint(0, EOD - 1, (17,), generator=torch.Generator().manual_seed(1))
    sample[torch.tensor([3, 4, 11])] = EOD
    saved, serial = find(str(folder)), (torch.device("cpu"), torch.float32)
    (got,) = WholeModel(saved, *serial, eod=EOD).score(sample[None]).mean_losses()
    monkeypatch.setattr(saved_model, "documents_followed", lambda *_: None)
    plain = WholeModel(saved, *serial)
    total, count = 0.0, 0
    for first, last in ((0, 3), (5, 11), (12, 16)):  # the losses at EODs do not count
        part = sample[first : last + 1]
        total += plain.score(part[None]).mean_losses()[0] * (last - first)
        count += last - first
    assert got == pytest.approx(total / count, abs=1e-5)


def test_data_without_the_end_of_documents_is_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path, eod=3)
    variables = {**OPTIONS, "DATA_FILE_LIST": str(data), "RUN_DIR": str(tmp_path / "run")}
    with pytest.raises(RankError, match=f"{DataError.__name__}.*id {EOD}, which ends documents"):
        run(train_recorded, 1, variables)
