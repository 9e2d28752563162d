"""What Megatron's order refuses before anything is read, and inputs that its model fails on."""

from pathlib import Path

import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed_header import read_header
from tests.data.megatron_cases import build, write_pair


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "data/full", [20] * 100)


def test_a_used_split_without_documents(tmp_path, pair):
    small = write_pair(tmp_path / "data/small", [100] * 7)
    lines = [(1.0, pair, "a"), (1.0, small, "b")]
    with pytest.raises(DataError, match=r"small: 7 documents split 990,10,0 .* raise VAL_SPLIT"):
        build(tmp_path / "cache", lines, shares=(990.0, 10.0, 0.0))
    assert not (tmp_path / "cache").exists()
    # It may have none where none are asked of it.
    for changes in ({"shares": (1.0, 0.0, 0.0)}, {"eval_interval": 0}, {"eval_iters": 0}):
        assert build(tmp_path / "cache", lines, **changes).valid is None


def test_documents_without_tokens(tmp_path, pair):
    empty = write_pair(tmp_path / "data/empty", [10] * 95 + [0] * 5)
    with pytest.raises(DataError, match=r"empty \(valid\) holds documents but no tokens"):
        build(tmp_path / "cache", [(1.0, pair, "a"), (1.0, empty, "a")], shares=(95.0, 5.0, 0.0))


def test_every_bad_file_is_named(tmp_path, pair):
    lines = [(1.0, pair, "a"), (1.0, f"{pair}-no", "a"), (1.0, f"{pair}-none", "b")]
    with pytest.raises(DataError) as error:
        build(tmp_path / "cache", lines)
    assert "full-no.idx" in str(error.value) and "full-none.idx" in str(error.value)


def test_evaluation_without_batches_is_said(tmp_path, pair):
    splits = build(tmp_path / "cache", [(1.0, pair, "a")], eval_iters=0)
    assert splits.valid is None and splits.test is None
    assert [line.partition(" ")[2] for line in splits.warnings] == [
        "valid samples are needed: EVAL_INTERVAL=20, EVAL_ITERS=0",
        "test samples are needed: EVAL_INTERVAL=20, EVAL_ITERS=0",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**32}, "SEED = 4294967296"),
        ({"seed": -1}, "SEED = -1"),
        ({"seq_length": 0}, "SEQ = 0"),
        ({"exact_epochs": 0}, "TRAIN_DATA_EXACT_NUM_EPOCHS = 0"),
        ({"exact_epochs": 9}, "TRAIN_DATA_EXACT_NUM_EPOCHS=9: .*full .train. needs 3 epochs"),
        ({"shares": (0.0, 1.0, 0.0)}, "TRAIN_SPLIT = 0"),
        ({"shares": (0.0, 0.0, 0.0)}, "TRAIN_SPLIT,VAL_SPLIT,TEST_SPLIT = 0,0,0"),
    ],
)
def test_settings_that_give_no_order(tmp_path, pair, changes, message):
    with pytest.raises(DataError, match=message):
        build(tmp_path / "cache", [(1.0, pair, "a")], **changes)


def test_no_list_no_weights(tmp_path, pair):
    with pytest.raises(DataError, match="names 0 files"):
        build(tmp_path / "cache", [])
    with pytest.raises(DataError, match="one above 0"):
        build(tmp_path / "cache", [(0.0, pair, "a")])


def test_a_damaged_index_is_refused(tmp_path, pair):
    index = Path(f"{pair}.idx")
    content = bytearray(index.read_bytes())
    content[34 + 8] = 21  # the third length, no longer the distance of two pointers
    index.write_bytes(content)
    read_header(pair)  # nothing wrong with the header
    with pytest.raises(DataError, match=r"full.idx: sequence 3 has byte offset"):
        build(tmp_path / "cache", [(1.0, pair, "a")])


def test_a_sample_beyond_the_plan(tmp_path, pair):
    train = build(tmp_path / "cache", [(1.0, pair, "a")]).train
    train.sample(len(train) - 1)
    for k in (-1, len(train)):
        with pytest.raises(DataError, match="raise TRAIN_ITERS"):
            train.sample(k)


def test_a_cache_that_cannot_be_written(tmp_path, pair):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set DATA_CACHE_PATH"):
        build(tmp_path / "file/cache", [(1.0, pair, "a")])
