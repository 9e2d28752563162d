"""Samples, splits and the two-level data set over real (small) files."""

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import DataError
from megatron.data.data_list import DataSource
from megatron.data.dataset import SampleLocation
from megatron.data.loader import Loader, StepPlan
from megatron.data.samples import FilePool
from megatron.data.splits import build_datasets, num_samples, split_ranges
from tests.data.pairs import idx_bytes, write_list

SEQ = 8
SIZES = {"news": [401, 120, 90], "code": [300, 257], "tiny": [40]}
WEIGHTS = {"news": 0.5, "code": 0.3, "tiny": 0.05}


@pytest.fixture
def entries(tmp_path):
    return write_list(tmp_path, SIZES, WEIGHTS)


@given(
    count=st.integers(0, 10**9),
    shares=st.tuples(st.floats(0, 1000), st.floats(0, 1000), st.floats(0, 1000)).filter(
        lambda shares: sum(shares) > 1e-3
    ),
)
def test_splits_are_contiguous_and_in_proportion(count, shares):
    ranges = split_ranges(count, shares)
    assert [r.start for r in ranges] == [0, ranges[0].stop, ranges[1].stop]
    assert ranges[2].stop == count
    for part, share in zip(ranges, shares, strict=True):
        assert abs(len(part) - count * share / sum(shares)) <= 1.001
        assert share > 0 or len(part) == 0


def test_the_number_of_samples_of_a_file():
    assert [num_samples(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_a_sample_is_the_tokens_of_its_place(entries):
    train = build_datasets(entries, SEQ, (1, 0, 0)).train
    for k in range(200):
        sample = train.sample(k)
        start = sample.index * SEQ
        assert sample.tokens.dtype == np.int64
        assert sample.tokens.tolist() == list(range(start, start + SEQ + 1))
        assert train.locate(k) == SampleLocation(
            sample.corpus, sample.file, sample.epoch, sample.index
        )


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4")])
def test_both_dtypes_are_read(tmp_path, code, dtype):
    tokens = np.arange(41) + (65000 if code == 8 else 300_000)  # beyond int16, beyond uint16
    (tmp_path / "a.bin").write_bytes(tokens.astype(dtype).tobytes())
    (tmp_path / "a.idx").write_bytes(idx_bytes([41], code, np.dtype(dtype).itemsize))
    train = build_datasets([_entry(str(tmp_path / "a"))], SEQ, (1, 0, 0)).train
    seen = {train.sample(k).index: train.sample(k).tokens.tolist() for k in range(5)}
    assert seen == {j: tokens[j * SEQ : (j + 1) * SEQ + 1].tolist() for j in range(5)}


def test_every_sample_once_an_epoch(entries):
    train = build_datasets(entries, SEQ, (1, 0, 0)).train
    seen: dict[tuple[str, int], list[int]] = {}
    for k in range(1500):
        place = train.locate(k)
        seen.setdefault((place.file, place.epoch), []).append(place.index)
    complete = 0
    for entry in entries:
        total = num_samples(SIZES[entry.corpus][int(entry.prefix[-1])], SEQ)
        epochs = sorted(epoch for file, epoch in seen if file == entry.prefix)
        assert epochs == list(range(len(epochs)))
        for epoch in epochs[:-1]:
            assert sorted(seen[entry.prefix, epoch]) == list(range(total))
            complete += 1
        orders = [seen[entry.prefix, epoch] for epoch in epochs[:-1]]
        assert len(orders) < 2 or orders[0] != orders[1]
    assert complete >= 10


def test_splits_share_no_sample_and_cover_all(entries):
    splits = build_datasets(entries, SEQ, (6, 3, 1))
    found: dict[str, dict[str, set[int]]] = {}
    for name, dataset in (("train", splits.train), ("valid", splits.valid), ("test", splits.test)):
        for k in range(3000):
            place = dataset.locate(k)
            found.setdefault(place.file, {}).setdefault(name, set()).add(place.index)
    for entry in entries:
        parts = list(found[entry.prefix].values())
        total = num_samples(SIZES[entry.corpus][int(entry.prefix[-1])], SEQ)
        assert sum(map(len, parts)) == len(set().union(*parts)) == total


def test_a_split_without_share_is_none(entries):
    splits = build_datasets(entries, SEQ, (990, 10, 0))
    assert splits.test is None
    assert splits.train is not None


def test_random_access_in_any_order_equals_sequential(entries):
    forwards, backwards = (build_datasets(entries, SEQ, (9, 1, 0)).train for _ in range(2))
    sequential = [forwards.locate(k) for k in range(300)]
    assert [backwards.locate(k) for k in reversed(range(300))] == sequential[::-1]


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 5)), min_size=1, max_size=4),
    ahead=st.integers(1, 3),
)
def test_no_batch_layout_or_resume_changes_what_a_run_reads(tmp_path_factory, parts, ahead):
    """Parts of a run, each with a micro-batch, GAS, replicas and steps of its own."""
    entries = write_list(tmp_path_factory.mktemp("d"), SIZES, WEIGHTS)
    read: dict[int, list[int]] = {}
    cursor = step = 0
    for micro_batch_size, gas, dp, steps in parts:
        batch = micro_batch_size * gas * dp
        starts = [(step + i, cursor + i * batch) for i in range(steps)]
        for rank in range(dp):
            plan = StepPlan(batch, micro_batch_size, gas, rank, dp)
            train = build_datasets(entries, SEQ, seed=5).train
            with Loader(train, plan, starts, ahead) as loader:
                for number, got in enumerate(loader):
                    first = starts[number // gas][1]
                    for k, row in zip(
                        plan.micro_batch(first, number % gas), got.tokens.tolist(), strict=True
                    ):
                        assert k not in read
                        read[k] = row
        cursor, step = cursor + steps * batch, step + steps
    whole = build_datasets(entries, SEQ, seed=5).train
    assert read == {k: whole.sample(k).tokens[:-1].tolist() for k in range(cursor)}


def test_a_moved_data_set_keeps_its_order(tmp_path):
    orders = []
    for folder in ("here", "elsewhere"):
        train = build_datasets(write_list(tmp_path / folder, SIZES), SEQ).train
        orders.append([(train.locate(k).corpus, train.locate(k).index) for k in range(100)])
    assert orders[0] == orders[1]


def test_seed_changes_the_order_within_files_not_the_mix(entries):
    one, two = (build_datasets(entries, SEQ, seed=seed).train for seed in (1, 2))
    places = [(one.locate(k), two.locate(k)) for k in range(200)]
    assert all(a.file == b.file for a, b in places)
    assert any(a.index != b.index for a, b in places)


def test_a_file_listed_twice_gets_two_orders(tmp_path):
    entry = write_list(tmp_path, {"a": [4000]})[0]
    train = build_datasets([entry, entry], SEQ, (1, 0, 0)).train
    order = [train.locate(k).index for k in range(600)]
    assert len(set(order[:100])) > 70  # not each sample twice in a row


def test_the_mix_follows_the_weights(entries):
    train = build_datasets(entries, SEQ).train
    counts = Counter(train.locate(k).corpus for k in range(850))
    total = sum(WEIGHTS[entry.corpus] for entry in entries)
    for corpus in SIZES:
        quota = 850 * sum(WEIGHTS[e.corpus] for e in entries if e.corpus == corpus) / total
        assert abs(counts[corpus] - quota) < 2


def test_a_line_of_weight_zero_is_as_if_taken_out(entries):
    unwanted = [
        entry._replace(weight=0.0) if entry.corpus == "code" else entry for entry in entries
    ]
    without = [entry for entry in entries if entry.corpus != "code"]
    order, expected = (build_datasets(e, SEQ, (1, 0, 0)).train for e in (unwanted, without))
    assert [order.locate(k) for k in range(200)] == [expected.locate(k) for k in range(200)]


def test_the_pool_stays_bounded_and_order_does_not_depend_on_it(entries):
    large = build_datasets(entries, SEQ).train
    expected = [large.sample(k).tokens.tolist() for k in range(100)]
    small = build_datasets(entries, SEQ, pool=FilePool(capacity=2)).train
    before = len(os.listdir("/proc/self/fd"))
    for k in range(100):
        assert small.sample(k).tokens.tolist() == expected[k]
        assert 1 <= len(os.listdir("/proc/self/fd")) - before <= 2


def test_files_too_short_are_skipped_with_a_warning_and_the_corpus_keeps_its_share(tmp_path):
    entries = write_list(tmp_path, {"a": [200, SEQ], "b": [200]})
    splits = build_datasets(entries, SEQ, (1, 0, 0))
    assert any("part1" in w and "corpus a" in w for w in splits.warnings)
    counts = Counter(splits.train.locate(k).corpus for k in range(300))
    assert abs(counts["a"] - 200) <= 2  # two lines of three, though one has no sample
    assert not any("part1" in splits.train.locate(k).file for k in range(300))


def test_validation_without_samples_is_none_and_said(tmp_path):
    splits = build_datasets(write_list(tmp_path, {"a": [50], "b": [4000]}), SEQ)
    assert {splits.valid.locate(k).corpus for k in range(50)} == {"b"}
    assert any("corpus a" in w and "validation" in w for w in splits.warnings)
    splits = build_datasets(write_list(tmp_path, {"a": [50]}), SEQ)
    assert splits.valid is None
    assert any("validation" in w for w in splits.warnings)


def _entry(prefix: str, weight: float = 1.0) -> DataSource:
    return DataSource(weight, prefix, "a", 1)


def test_what_cannot_train_is_refused(tmp_path):
    good = write_list(tmp_path, {"a": [200]})[0]
    short = write_list(tmp_path / "short", {"b": [SEQ]})[0]
    for entries, splits, message in [
        ([_entry(str(tmp_path / "gone"))], (1, 0, 0), "gone"),
        ([_entry(good.prefix, 0.0)], (1, 0, 0), "no file with a weight above 0"),
        ([_entry(good.prefix, -1.0)], (1, 0, 0), "weight -1"),
        ([good, short], (1, 0, 0), "corpus b.*lower SEQ"),
        ([short], (1, 0, 0), "train sample.*lower SEQ"),
        ([], (1, 0, 0), "no file"),
        ([good], (0, 0, 0), "TRAIN_SPLIT"),
        ([good], (-1, 2, 0), "TRAIN_SPLIT"),
    ]:
        with pytest.raises(DataError, match=message):
            build_datasets(entries, SEQ, splits)
