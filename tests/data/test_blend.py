"""The stateless blend: quotas of prefixes and batches, chunk borders, random access."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.blend import GOLDEN_RATIO, Blend
from tests.data.pairs import mix_weights

BATCH = 768
DRAWS = 400 * BATCH

weight_lists = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=40)


def brute_force(weights: list[float], count: int) -> list[tuple[int, int]]:
    """The rule as it is written, one number at a time."""
    shares = [w / float(np.sum(weights)) for w in weights]
    draws = [
        ((k + (position + 1) * GOLDEN_RATIO % 1.0) / share, position, k)
        for position, share in enumerate(shares)
        for k in range(int(count * share) + len(weights) + 3)
    ]
    return [(position, k) for _, position, k in sorted(draws)[:count]]


@settings(max_examples=40, deadline=None)
@given(weights=weight_lists, chunk=st.integers(1, 50))
def test_equals_the_rule_as_written(weights, chunk):
    blend = Blend(weights, chunk)
    assert [blend.draw(m) for m in range(150)] == brute_force(weights, 150)


@settings(max_examples=40, deadline=None)
@given(weights=weight_lists, start=st.integers(0, 10**11), data=st.data())
def test_chunk_borders_agree_anywhere(weights, start, data):
    """However a stretch is cut, no draw is missing, doubled or out of place."""
    cut = data.draw(st.integers(0, 200))
    whole = np.stack(Blend(weights).draws(start, start + 200))
    parts = [
        Blend(weights).draws(start, start + cut),
        Blend(weights).draws(start + cut, start + 200),
    ]
    assert np.array_equal(whole, np.concatenate([np.stack(part) for part in parts], axis=1))
    first_counts, last_counts = Blend(weights).counts(start), Blend(weights).counts(start + 200)
    assert first_counts.sum() == start
    assert np.array_equal(last_counts - first_counts, np.bincount(whole[0], minlength=len(weights)))


@settings(max_examples=100, deadline=None)
@given(weights=weight_lists, k=st.integers(0, 10**9))
def test_a_draw_is_a_member_at_its_own_due_time_to_the_last_bit(weights, k):
    """Chunk borders fall on due times: counting there must round as sorting does."""
    blend = Blend(weights)
    everyone = np.arange(len(weights))
    for source, due in enumerate(blend._due(np.full(len(weights), k), everyone)):
        assert blend._due_until(float(due))[source] == k + 1
        assert blend._due_until(float(np.nextafter(due, 0)))[source] == k


def test_draws_of_a_source_are_numbered_without_gap():
    sources, own = Blend([0.5, 0.3, 0.2]).draws(0, 1000)
    for source in range(3):
        mine = own[sources == source]
        assert np.array_equal(mine, np.arange(len(mine)))


@settings(max_examples=20, deadline=None)
@given(weights=weight_lists, places=st.lists(st.integers(0, 10**6), max_size=8))
def test_random_access_equals_fresh_access(weights, places):
    blend = Blend(weights)
    assert [blend.draw(m) for m in places] == [Blend(weights, 1).draw(m) for m in places]


@pytest.mark.parametrize("weights", [[1.0] * 7, [0.5, 0.5], [1.0], [1.0, 2.0, 4.0, 8.0]])
def test_equal_due_times_are_taken_by_position(weights, monkeypatch):
    monkeypatch.setattr("megatron.data.blend.GOLDEN_RATIO", 1.0)  # all phases 0: many ties
    blend = Blend(weights, chunk=3)
    shares = np.array(weights) / sum(weights)
    rule = sorted((k / s, f, k) for f, s in enumerate(shares) for k in range(130))[:120]
    assert [blend.draw(m) for m in range(120)] == [(f, k) for _, f, k in rule]
    assert all(blend.counts(m).sum() == m for m in range(120))


def deviations(sources: np.ndarray, share: float, source: int) -> np.ndarray:
    """Draws of a source minus its quota, for every prefix, shape (draws + 1,)."""
    counts = np.concatenate([[0], np.cumsum(sources == source)])
    return counts - np.arange(len(counts)) * share


@pytest.fixture(scope="module")
def mix():
    weights = mix_weights()
    corpora = Blend([sum(files) for files in weights.values()])
    sources, own = corpora.draws(0, DRAWS)
    return list(weights.values()), corpora.weights, sources, own


def test_quotas_of_corpora(mix):
    """Bounds as measured on a list of this make: at steps, at every prefix, in every batch."""
    _, shares, sources, _ = mix
    for source, share in enumerate(shares):
        off = deviations(sources, share, source)
        assert np.abs(off[::BATCH]).max() < 1.8
        assert np.abs(off).max() < 2.3
        assert np.abs(off[BATCH:] - off[:-BATCH]).max() < 1.9


def test_quotas_of_files(mix):
    """Within its corpus, and of all samples, at every prefix."""
    weights, shares, sources, own = mix
    for source, files in enumerate(weights):
        blend = Blend(files)
        drawn, _ = blend.draws(0, int(own[sources == source][-1]) + 1)
        in_corpus = np.concatenate([[0], np.cumsum(sources == source)])
        quota = np.arange(DRAWS + 1) * shares[source]
        for file in range(0, len(files), 9):
            share = blend.weights[file]
            off = deviations(drawn, share, file)
            assert np.abs(off).max() < 1.3
            counts = off[in_corpus] + in_corpus * share
            assert np.abs(counts - quota * share).max() < 1.4


def test_counts_at_a_trillion_samples_are_within_quota():
    blend = Blend([w for files in mix_weights().values() for w in files])
    m = 10**12
    counts = blend.counts(m)
    assert counts.sum() == m
    assert np.abs(counts - m * blend.weights).max() < 60
