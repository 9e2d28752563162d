"""tools/inspect_batch.py against what a run read, and the loss of each corpus in its metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megatron.data.data_list import parse_data_list
from megatron.data.indexed import IndexedDataset
from megatron.training import metrics_file
from tests.data.megatron_cases import build
from tests.data.resumed import train_noting
from tests.e2e.recorded import write_data
from tests.spawn import run
from tools import inspect_batch

SETTINGS = {
    "GLOBAL_BATCH": "8", "TRAIN_ITERS": "4", "SAVE_INTERVAL": "2", "LOG_CORPUS_LOSS": "1",
    "LR_DECAY_ITERS": "4",
}  # fmt: skip
LAYOUTS = {
    "dp2": {"WORLD_SIZE": "2", "MICRO_BATCH": "2"},
    "tp2": {"TP": "2"},
    "pp2": {"PP": "2", "MICRO_BATCH": "1"},
    "sp2": {"SP": "2"},
}


def train(folder: Path, layout: str, **variables: str) -> list[dict[int, Any]]:
    settings = {
        **SETTINGS, **LAYOUTS[layout], "DATA_FILE_LIST": str(folder / "list.txt"),
        "RUN_DIR": str(folder / "run"), **variables,
    }  # fmt: skip
    results = run(train_noting, 2, settings)
    assert all(isinstance(result, dict) for result in results), results
    return results


def inspect(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> Any:
    capsys.readouterr()
    assert inspect_batch.main(["--run", str(folder / "run"), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_is_what_the_run_read(tmp_path, capsys):
    write_data(tmp_path, files=3, tokens=4000)
    read = train(tmp_path, "dp2")
    places = read[0] | read[1]
    for step in (1, 3):
        found = inspect(capsys, tmp_path, "--step", str(step), "--decode")["samples"]
        assert [row["sample"] for row in found] == list(range((step - 1) * 8, step * 8))
        for row in found:
            name, epoch, index = places[row["sample"]]
            assert (row["file"].endswith(name), row["epoch"], row["index"]) == (True, epoch, index)
            whole = IndexedDataset(row["file"])
            start = index * 16
            assert row["tokens"] == whole.tokens[start : start + 17].tolist()
            assert row["text"] == " ".join(map(str, row["tokens"]))
            parts = [
                whole.sequence(part["document"])[part["offset"] :][: part["length"]].tolist()
                for part in row["documents"]
            ]
            assert [token for part in parts for token in part] == row["tokens"]
    for rank in (0, 1):
        rows = inspect(capsys, tmp_path, "--step", "2", "--rank", str(rank))["samples"]
        assert {row["sample"] for row in rows} == read[rank].keys() & set(range(8, 16))
    later = inspect(capsys, tmp_path, "--step", "9")
    assert later["fate"] == "to come"
    assert [row["sample"] for row in later["samples"]] == list(range(64, 72))


@pytest.mark.parametrize("order", ["stateless", "megatron"])
def test_a_document_is_found_wherever_it_was_read(tmp_path, capsys, order):
    write_data(tmp_path, files=2, tokens=400)  # 24 samples of training a file: several epochs
    settings = {"DATA_ORDER": order, "TRAIN_SPLIT": "1", "VAL_SPLIT": "0"}
    train(tmp_path, "dp2", TRAIN_ITERS="12", LR_DECAY_ITERS="12", SAVE_INTERVAL="0", **settings)
    uses = defaultdict(list)
    for step in range(1, 13):
        for row in inspect(capsys, tmp_path, "--step", str(step))["samples"]:
            for document in {part["document"] for part in row["documents"]}:
                uses[row["file"], document].append([step, row["sample"], row["epoch"]])
    assert max(epoch for found in uses.values() for _, _, epoch in found) >= 1
    for file in {file for file, _ in uses}:
        for document in range(10):
            found = inspect(capsys, tmp_path, "--find-document", f"{file}:{document}")
            assert [list(use.values()) for use in found] == uses[file, document], document


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_samples_and_corpora(tmp_path, capsys, layout):
    """Step 3's losses are those of the checkpoint of step 2, computed by one process."""
    write_data(tmp_path, files=3, tokens=4000)
    train(tmp_path, layout, EVAL_INTERVAL="2", EVAL_ITERS="1")
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    rows = inspect(capsys, tmp_path, "--step", "3", "--loss", str(checkpoint))["samples"]
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    (step,) = [
        record
        for record in metrics_file.read(tmp_path / "run/metrics.jsonl")
        if record["event"] == "step" and record["iteration"] == 3
    ]
    assert sum(losses) / 8 == pytest.approx(step["loss"], abs=1e-5)
    corpora = defaultdict(list)
    for row in rows:
        corpora[row["corpus"]].append(row["loss"])
    assert len(corpora) == 2 and len({len(part) for part in corpora.values()}) == 2
    wanted = {name: sum(part) / len(part) for name, part in corpora.items()}
    assert step["corpus_loss"] == pytest.approx(wanted, abs=1e-5)


def test_stages_of_megatron_order_are_known_from_the_checkpoint(tmp_path, capsys):
    """Neither the list of today nor a longer run changes what is said of the steps before."""
    path = write_data(tmp_path, files=3)
    settings = {"DATA_ORDER": "megatron", "TRAIN_RANGE_TO_SKIP": "2 2"}
    train(tmp_path, "tp2", **settings)
    first = [inspect(capsys, tmp_path, "--step", str(step)) for step in (1, 2, 4)]
    assert [step["fate"] for step in first] == ["taken", "skipped", "taken"]
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert [inspect(capsys, tmp_path, "--step", str(step)) for step in (1, 2, 4)] == first
    train(tmp_path, "dp2", **settings, TRAIN_ITERS="8", ALLOW_DATA_CHANGE="1")
    assert [inspect(capsys, tmp_path, "--step", str(step)) for step in (1, 2, 4)] == first
    sources = parse_data_list(path)
    order = build(
        tmp_path / "cache", [source[:3] for source in sources], shares=(990.0, 10.0, 0.0),
        train_iters=8, eval_interval=0,
    ).train  # fmt: skip
    later = inspect(capsys, tmp_path, "--step", "6")["samples"]  # the stage's own second step
    assert [row["tokens"] for row in later] == [
        order.sample(k).tokens.tolist() for k in range(8, 16)
    ]


def test_standard_output_is_json_alone(tmp_path):
    write_data(tmp_path)
    train(tmp_path, "dp2", TRAIN_ITERS="2")
    tool = Path(inspect_batch.__file__)
    done = subprocess.run(
        [sys.executable, str(tool), "--run", str(tmp_path / "run"), "--step", "3", "--json",
         "--loss", str(tmp_path / "run/checkpoints/step-00000002")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [len(row["tokens"]) for row in json.loads(done.stdout)["samples"]] == [17] * 8


def test_wrong_settings(tmp_path, capsys):
    assert inspect_batch.main(["--run", str(tmp_path), "--step", "1"]) == 2
    assert f"--run {tmp_path}: it holds no run.json" in capsys.readouterr().err
