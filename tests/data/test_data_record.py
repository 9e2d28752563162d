"""The record of what a run is trained on: what counts as a change, and how it reads."""

import json
from pathlib import Path

import pytest

from megatron.checkpoint.state import RunState
from megatron.config.errors import DataError
from megatron.data.data_list import ListStage
from megatron.data.data_record import data_record, differences, drawn_before, stateless_order
from megatron.data.indexed_header import read_header
from megatron.data.splits import Origin, build_datasets
from megatron.training.run_data import continue_data
from tests.data.pairs import write_list

SIZES = {"news": [401, 120], "code": [300]}


def record(folder: Path, sizes=SIZES, stages=None, **changes):
    entries = tuple(write_list(folder, sizes)) if stages is None else ()
    stages = stages or (ListStage(0, str(folder / "list.txt"), entries),)
    headers = {s.prefix: read_header(s.prefix) for stage in stages for s in stage.sources}
    settings = {
        "order": "stateless", "seed": 1, "seq_length": 8, "shares": (9, 1, 0),
        "tokenizer": "a" * 64,
    }  # fmt: skip
    made = data_record(stages, headers, **{**settings, **changes})
    return json.loads(json.dumps(made))  # as a checkpoint gives it back


def test_moved_data_is_the_same_data(tmp_path):
    assert differences(record(tmp_path / "here"), record(tmp_path / "there")) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 2}, "SEED: 1 -> 2"),
        ({"seq_length": 4096}, "SEQ: 8 -> 4,096"),
        ({"tokenizer": "b" * 64}, "tokenizer (fingerprint): aaaaaaaaaaaa -> bbbbbbbbbbbb"),
        ({"order": "megatron"}, "DATA_ORDER: stateless -> megatron"),
        ({"shares": (8, 2, 0)}, "TRAIN_SPLIT,VAL_SPLIT,TEST_SPLIT: 9,1,0 -> 8,2,0"),
        ({"settings": {"TRAIN_ITERS x GLOBAL_BATCH": 5}}, "TRAIN_ITERS x GLOBAL_BATCH: None -> 5"),
    ],
)
def test_each_setting_that_decides_the_samples_is_a_change(tmp_path, changes, line):
    assert differences(record(tmp_path), record(tmp_path, **changes)) == [line]


def test_changes_of_the_list_are_said_file_by_file(tmp_path):
    before = record(tmp_path)
    grown = record(tmp_path / "b", {"news": [402, 120], "code": [300]})
    assert differences(before, grown) == ["tokens of news/part0: 401 -> 402"]
    less = record(tmp_path / "c", {"news": [401, 120], "wiki": [300]})
    assert differences(before, less) == [
        "- file code/part0: 300 tokens, weight 1",
        "+ file wiki/part0: 300 tokens, weight 1",
    ]
    entries = write_list(tmp_path, SIZES)
    for sources, line in [
        (entries[::-1], "the lines are in another order"),
        (
            [entries[0]._replace(weight=0.5), *entries[1:]],
            "weight of news/part0: 1 -> 0.5",
        ),
        (
            [e._replace(max_epochs=2.0 if e.corpus == "news" else None) for e in entries],
            "max_epochs of corpus news: None -> 2.0",
        ),
    ]:
        now = record(tmp_path, stages=(ListStage(0, "other name", tuple(sources)),))
        assert differences(before, now) == [line]
    stage = ListStage(0, "a", tuple(entries))
    staged = record(tmp_path, stages=(stage, stage._replace(start_tokens=2000)))
    assert differences(before, staged) == ["stages: 1 -> 2"]


def test_a_record_gives_the_order_without_the_files(tmp_path):
    entries = tuple(write_list(tmp_path, SIZES))
    made = record(tmp_path)
    real = build_datasets(entries, 8, (9, 1, 0), 1).train
    for entry in entries:
        Path(f"{entry.prefix}.bin").unlink()
        Path(f"{entry.prefix}.idx").unlink()
    order = stateless_order(made, Origin())
    assert [order.locate(k) for k in range(300)] == [real.locate(k) for k in range(300)]
    assert order.drawn(300) == real.drawn(300)
    assert sum(order.drawn(300).values()) == 300


def test_a_changed_state(tmp_path):
    before, now = record(tmp_path), record(tmp_path / "b", {"news": [401, 120], "more": [300]})
    fresh = continue_data(RunState(), before, False, "runs/a")
    assert [(s.samples, s.record) for s in fresh.data] == [(0, before)]
    imported = continue_data(RunState(5, 50, 400), before, False, "runs/a")
    assert imported.data == fresh.data, "its 50 samples count as drawn: sample 50 is next"
    later = RunState(5, 50, 400, data=fresh.data)
    assert continue_data(later, before, False, "runs/a") == later
    with pytest.raises(DataError, match=r"runs/a was (.|\n)*- file code/part0(.|\n)*--allow"):
        continue_data(later, now, False, "runs/a")
    changed = continue_data(later, now, True, "runs/a")
    assert [(s.iteration, s.samples, s.tokens) for s in changed.data] == [(0, 0, 0), (5, 50, 400)]
    assert changed.data[1].drawn == drawn_before(before, Origin(), now, 50)
    assert sum(changed.data[1].drawn.values()) == 50
    assert RunState.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def test_samples_of_another_length_begin_anew(tmp_path):
    before, now = record(tmp_path), record(tmp_path, seq_length=16)
    assert drawn_before(before, Origin(), now, 50) == {}
