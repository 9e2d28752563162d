"""The fast greedy blend is the slow rule, draw for draw, and is fast."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.megatron_order import greedy
from tests.data.slow_order import greedy as slow_greedy


def fast(weights, size):
    draws = list(greedy.greedy_blend(np.array(weights, dtype=np.float64), size))
    sources = np.concatenate([d.sources for d in draws]).tolist()
    return list(zip(sources, np.concatenate([d.numbers for d in draws]).tolist(), strict=True))


WEIGHTS = st.one_of(
    st.lists(st.integers(1, 5), min_size=1, max_size=14),  # many ties
    st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=14),  # rare sources
    st.lists(st.sampled_from([1e-7, 1e-4, 0.3, 0.3, 1.0]), min_size=2, max_size=30),
    st.lists(st.integers(0, 3), min_size=2, max_size=6).filter(any),  # no weight at all
)


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, st.integers(1, 1500))
def test_every_draw_is_that_of_the_slow_rule(weights, size):
    total = sum(weights)
    weights = [weight / total for weight in weights]
    assert fast(weights, size) == slow_greedy(weights, size)


@settings(max_examples=25, deadline=None)
@given(WEIGHTS, st.integers(1, 1500), st.integers(1, 40), st.integers(1, 40))
def test_the_size_of_the_blocks_changes_nothing(weights, size, blocks, length):
    weights = np.array(weights) / np.sum(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "_BLOCKS", blocks)
        patch.setattr(greedy, "_BLOCK", length)
        patch.setattr(greedy, "_SHORTEST", 1)
        patch.setattr(greedy, "_SETTLE", length // 2)
        assert fast(weights, size) == slow_greedy(weights.tolist(), size)


@pytest.mark.parametrize("guess", ["zero", "late", "wild"])
def test_the_guess_changes_nothing(guess, monkeypatch):
    draw = np.random.RandomState(3)

    def wrong(weights, draws):
        if guess == "zero":
            return np.zeros((len(draws), len(weights)))
        if guess == "late":
            return np.floor(np.maximum(draws - 50, 0)[:, None] * weights)
        return draw.randint(0, 100, size=(len(draws), len(weights))).astype(float)

    monkeypatch.setattr(greedy, "_guess", wrong)
    weights = draw.lognormal(0, 2, 7)
    weights /= weights.sum()
    assert fast(weights, 5000) == slow_greedy(weights.tolist(), 5000)


def test_long_blends_of_many_sources():
    draw = random.Random(5)
    for count, size in ((3, 60_000), (14, 30_000), (300, 3_000)):
        weights = [draw.lognormvariate(0, 2) for _ in range(count)]
        total = sum(weights)
        weights = [weight / total for weight in weights]
        assert fast(weights, size) == slow_greedy(weights, size)


@pytest.mark.long
def test_millions_of_draws_are_those_of_the_slow_rule():
    weights = [0.5, 0.3, 0.2 - 1.3e-5, 1e-5, 3e-6]
    assert fast(weights, 3_000_000) == slow_greedy(weights, 3_000_000)


@pytest.mark.long
@pytest.mark.parametrize(("count", "least"), [(2, 5e6), (3, 5e6), (14, 2e6)])
def test_speed(count, least):
    draw = np.random.RandomState(0)
    weights = draw.lognormal(0, 1, count)
    weights /= weights.sum()
    size, seconds = 4_000_000, []
    for _ in range(3):
        started = time.process_time()
        assert sum(len(draws.sources) for draws in greedy.greedy_blend(weights, size)) == size
        seconds.append(time.process_time() - started)
    rate = size / min(seconds)
    assert rate > least, f"{rate / 1e6:.1f} million draws a second of processor time"
