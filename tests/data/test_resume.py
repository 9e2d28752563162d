"""A resumed run reads each sample exactly once, and refuses data that is not what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.analysis.explain import RunHistory
from megatron.training import metrics_file as records
from tests.data.resumed import Place, train_noting
from tests.e2e.recorded import write_data
from tests.spawn import run

SMALL = {"HIDDEN": "16", "NLAYERS": "2", "HEADS": "2", "NUM_KV_HEAD": "2", "FFN_HIDDEN_SIZE": "16"}


def noted(tmp_path: Path, world: int = 1, **variables: str) -> dict[int, Place]:
    """What all ranks of a run read, from wherever it stands."""
    settings = {
        "DATA_FILE_LIST": str(tmp_path / "list.txt"),
        "RUN_DIR": str(tmp_path / "run"),
        "WORLD_SIZE": str(world),
        **SMALL,
        **variables,
    }
    results = run(train_noting, world, settings)
    refused = [result for result in results if isinstance(result, str)]
    if refused:
        raise AssertionError(refused[0])
    read: dict[int, Place] = {}
    for rank, result in enumerate(results):
        if "TP" not in variables:  # ranks of one replica read the same samples
            assert not read.keys() & result.keys(), f"rank {rank} reads what another one has read"
        read |= result
    return read


def test_each_sample_once_whatever_batch_and_layout_a_resume_has(tmp_path: Path) -> None:
    write_data(tmp_path)
    again = {"RESUME": str(tmp_path / "run")}  # another batch is wanted, not an accident
    read = [
        noted(tmp_path, GLOBAL_BATCH="8", TRAIN_ITERS="3"),
        noted(tmp_path, 2, GLOBAL_BATCH="12", TRAIN_ITERS="5", **again),
        noted(tmp_path, 2, GLOBAL_BATCH="4", TP="2", TRAIN_ITERS="8", **again),
    ]
    assert [sorted(part) for part in read] == [
        list(range(24)),
        list(range(24, 48)),
        list(range(48, 60)),
    ]
    places = [place for part in read for place in part.values()]
    assert len(set(places)) == 60
    whole = noted(tmp_path, RUN_DIR=str(tmp_path / "whole"), GLOBAL_BATCH="12", TRAIN_ITERS="5")
    assert whole == {k: place for part in read for k, place in part.items()}


@pytest.mark.parametrize("order", ["stateless", "megatron"])
def test_a_run_with_lines_of_weight_zero(tmp_path: Path, order: str) -> None:
    """A whole corpus and a file of another: trained, saved, resumed without a token of them."""
    path = write_data(tmp_path, files=4)
    lines = [line.split() for line in path.read_text().splitlines()]
    unread = [lines[1][1], lines[2][1]]
    lines[1][2] = "alone"
    path.write_text("".join(f"{0 if p in unread else w} {p} {c}\n" for w, p, c in lines))
    settings = {
        "DATA_FILE_LIST": str(path), "RUN_DIR": str(tmp_path / "run"), "DATA_ORDER": order,
        "LOG_CORPUS_LOSS": "1", "EVAL_INTERVAL": "4", "EVAL_ITERS": "1", "VAL_SPLIT": "100",
        **SMALL,
    }  # fmt: skip
    for iters in ("4", "8"):  # the megatron order depends on the length: a new stage
        run(train_noting, 1, {**settings, "TRAIN_ITERS": iters, "ALLOW_DATA_CHANGE": "1"})
    steps = [r for r in records.read(tmp_path / "run/metrics.jsonl") if r["event"] == "step"]
    assert [step["iteration"] for step in steps] == list(range(1, 9))
    assert {name for step in steps for name in step["corpus_loss"]} == {"corpus_0", "corpus_1"}
    history = RunHistory(tmp_path / "run")
    files = {history.explain(k).file for k in range(64)}
    assert files == {prefix for _, prefix, _ in lines} - set(unread)


def test_a_changed_list_is_refused_or_begins_a_stage_that_repeats_nothing(tmp_path: Path) -> None:
    path = write_data(tmp_path, files=3, tokens=2000)
    lines = path.read_text().splitlines()
    first = noted(tmp_path, TRAIN_ITERS="10")
    path.write_text(f"5 {lines[0][2:]}\n{lines[2]}\n")
    with pytest.raises(AssertionError) as refusal:
        noted(tmp_path, TRAIN_ITERS="14")
    for words in (
        "step-00000010 was trained on",
        "weight of corpus_0/part_0: 1 -> 5",
        "- file corpus_1/part_1: 2,000 tokens, weight 2",
        "--allow-data-change",
        "sample 80",
    ):
        assert words in str(refusal.value)
    second = noted(tmp_path, TRAIN_ITERS="14", ALLOW_DATA_CHANGE="1")
    assert sorted(second) == list(range(80, 112))
    # Later starts know where the stage began, whether or not a change is still allowed.
    third = noted(tmp_path, 2, TRAIN_ITERS="16")
    assert sorted(third) == list(range(112, 128))
    places = [*first.values(), *second.values(), *third.values()]
    assert len(set(places)) == len(places)
    assert {file for file, _, _ in second.values()} == {"part_0", "part_2"}
    stages = json.loads((tmp_path / "run/checkpoints/step-00000016/data.json").read_text())
    assert [stage["samples"] for stage in stages] == [0, 80]
    assert [len(stage["record"]["stages"][0]["files"]) for stage in stages] == [3, 2]
