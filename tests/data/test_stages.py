"""Stages and limits of epochs: nothing is repeated too early, nothing depends on what was asked."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.blend import GOLDEN_RATIO, Blend
from megatron.data.data_list import DataSource, ListStage
from megatron.data.splits import Origin, build_datasets, build_stages, num_samples
from megatron.data.survey import survey_stages
from tests.data.pairs import write_list

SEQ = 8
SIZES = {"news": [801, 240, 180], "code": [600, 514], "tiny": [80]}


def limited(entries: list[DataSource], **limits: float) -> tuple[DataSource, ...]:
    return tuple(entry._replace(max_epochs=limits.get(entry.corpus)) for entry in entries)


def places(dataset, start: int, stop: int) -> list[tuple[str, int, int]]:
    found = [dataset.locate(k) for k in range(start, stop)]
    return [(place.file, place.epoch, place.index) for place in found]


sources = st.lists(
    st.tuples(st.floats(1e-3, 1.0), st.none() | st.integers(0, 20)), min_size=1, max_size=12
)


@settings(max_examples=30, deadline=None)
@given(sources=sources, chunk=st.integers(1, 20))
def test_a_blend_with_limits_equals_the_rule_as_written(sources, chunk):
    """The draws of the unlimited rule, without those beyond a limit."""
    weights, limits = [w for w, _ in sources], [n for _, n in sources]
    blend = Blend(weights, chunk, limits)
    shares = np.asarray(weights) / np.asarray(weights).sum()
    total = 60 if blend.total is None else min(60, blend.total)
    rule = sorted(
        ((k + (position + 1) * GOLDEN_RATIO % 1.0) / share, position, k)
        for position, (share, limit) in enumerate(zip(shares, limits, strict=True))
        for k in range(80 if limit is None else limit)
    )
    order = [(position, k) for _, position, k in rule][:total]
    assert [blend.draw(m) for m in range(total)] == order
    assert [blend.position(*draw) for draw in order[::7]] == list(range(0, total, 7))
    counts = np.bincount([source for source, _ in order], minlength=len(weights))
    assert blend.counts(total).tolist() == counts.tolist()


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=30), m=st.integers(0, 10**10))
def test_a_draw_is_found_again_anywhere(weights, m):
    blend = Blend(weights)
    assert blend.position(*blend.draw(m)) == m


def test_no_sample_is_seen_more_often_than_its_corpus_allows(tmp_path):
    entries = limited(write_list(tmp_path, SIZES), news=1.5, tiny=2)
    train = build_datasets(entries, SEQ, (1, 0, 0)).train
    seen: Counter[str] = Counter()
    twice: Counter[tuple[str, int]] = Counter()
    for place in (train.locate(k) for k in range(2500)):
        seen[place.file] += 1
        twice[place.file, place.index] += 1
    for entry in entries:
        samples = num_samples(SIZES[entry.corpus][int(entry.prefix[-1])], SEQ)
        if entry.max_epochs is not None:
            assert seen[entry.prefix] == int(entry.max_epochs * samples)
            most = max(n for (file, _), n in twice.items() if file == entry.prefix)
            assert most == -int(-entry.max_epochs // 1)
    # The corpus without a limit takes their place; before that the order is the unlimited one.
    assert {train.locate(k).corpus for k in range(2000, 2500)} == {"code"}
    free = build_datasets(entries[:0] or limited(entries), SEQ, (1, 0, 0)).train
    assert places(train, 0, 50) == places(free, 0, 50)


def test_a_limit_does_not_touch_evaluation(tmp_path):
    entries = limited(write_list(tmp_path, SIZES), news=1, code=1, tiny=1)
    splits = build_datasets(entries, SEQ, (9, 1, 0))
    assert splits.train.total is not None
    assert splits.valid.total is None


def test_stages_go_on_with_each_file_where_it_stood(tmp_path):
    entries = write_list(tmp_path, SIZES)
    a = ListStage(0, "a", tuple(entries[:4]))
    b = ListStage(100 * SEQ - 3, "b", tuple(entries[2:]))  # not at a border: the next sample
    train = build_stages([a, b], SEQ, (1, 0, 0)).train
    alone = build_datasets(a.sources, SEQ, (1, 0, 0)).train
    assert places(train, 0, 100) == places(alone, 0, 100)
    assert {train.locate(k).file for k in range(100, 200)} <= {e.prefix for e in entries[2:]}
    epochs: dict[str, dict[int, list[int]]] = {}
    for file, epoch, index in places(train, 0, 700):
        epochs.setdefault(file, {}).setdefault(epoch, []).append(index)
    for entry in entries:
        samples = num_samples(SIZES[entry.corpus][int(entry.prefix[-1])], SEQ)
        rounds = epochs[entry.prefix]
        assert sorted(rounds) == list(range(len(rounds)))
        for epoch, indices in rounds.items():
            assert len(indices) == len(set(indices))  # nothing twice in an epoch, over both stages
            assert epoch == max(rounds) or len(indices) == samples


def test_a_limit_counts_the_whole_run(tmp_path):
    entries = write_list(tmp_path, SIZES)
    a = ListStage(0, "a", limited(entries[:3]))
    b = ListStage(200 * SEQ, "b", limited(entries, news=3))
    train = build_stages([a, b], SEQ, (1, 0, 0)).train
    seen = Counter(file for file, _, _ in places(train, 0, 2500))
    for entry in entries[:3]:
        assert seen[entry.prefix] == 3 * num_samples(SIZES["news"][int(entry.prefix[-1])], SEQ)
    assert train.shortage(2500) is None
    only = build_stages([a, b._replace(sources=b.sources[:3])], SEQ, (1, 0, 0)).train
    total = 3 * sum(num_samples(n, SEQ) for n in SIZES["news"]) - 200
    assert only.shortage(200 + total) is None
    assert only.shortage(201 + total) == (1, total, total + 1)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), min_size=1, max_size=3), data=st.data())
def test_a_plan_begun_at_any_cursor_is_the_plan_from_its_own_start(tmp_path_factory, cuts, data):
    """Changing nothing at a cursor only moves the blend's start: every file goes on in order."""
    entries = tuple(write_list(tmp_path_factory.mktemp("d"), SIZES))
    stage = ListStage(0, "a", entries)
    drawn: dict[str, int] = {}
    begun, seen = 0, []
    for cut in sorted(cuts):
        train = build_stages([stage], SEQ, (1, 0, 0), 1, Origin(begun, begun * SEQ, drawn)).train
        seen += places(train, begun, cut)
        drawn, begun = train.drawn(cut), cut
    assert len(seen) == len(set(seen))
    assert sum(drawn.values()) == begun


def test_the_table_of_epochs_is_what_the_order_does(tmp_path):
    entries = write_list(tmp_path, SIZES, {"news": 2.0, "code": 1.0, "tiny": 0.1})
    a = ListStage(0, "a", limited(entries[:4], news=1.25))
    b = ListStage(150 * SEQ, "b", limited(entries, news=1.25, tiny=1))
    train = build_stages([a, b], SEQ, (1, 0, 0)).train
    count = 400
    seen = Counter(train.locate(k).corpus for k in range(count))
    survey = survey_stages((a, b), count * SEQ, 1.0, SEQ)
    for corpus in survey.corpora:
        assert abs(corpus.share * count - seen[corpus.name]) < 6
        samples = sum(num_samples(n, SEQ) for n in SIZES[corpus.name])
        assert corpus.epochs == pytest.approx(seen[corpus.name] / samples, abs=0.15)
