"""Keyed permutations: one-to-one and without visible pattern."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.permutation import NUM_ROUNDS, Permutation, round_keys

keys = st.builds(round_keys, st.integers(0, 2**31), st.text(max_size=5), st.integers(0, 9))


def _images(permutation):
    return np.array([permutation(i) for i in range(permutation.n)])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), keys=keys)
def test_every_value_once(n, keys):
    images = _images(Permutation(n, keys))
    assert np.array_equal(np.sort(images), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 1 << 61), keys=keys, data=st.data())
def test_large_ranges_are_one_to_one_and_have_an_inverse(n, keys, data):
    permutation = Permutation(n, keys)
    places = data.draw(st.lists(st.integers(0, n - 1), max_size=5))
    images = [permutation(i) for i in places]
    assert [permutation.inverse(image) for image in images] == places
    assert all(0 <= image < n for image in images)
    assert len(set(images)) == len(set(places))


def test_the_order_is_fixed_for_all_time():
    """A change of this order would silently repeat and omit samples of runs that are resumed."""
    assert [Permutation(10, round_keys(1234, "c/f/1/0", 0))(i) for i in range(10)] == [
        0,
        5,
        8,
        9,
        6,
        7,
        3,
        4,
        1,
        2,
    ]
    assert [Permutation(10**12, round_keys(1, "x", 7))(i) for i in range(3)] == [
        986666283109,
        765586388965,
        942372059984,
    ]


def test_seed_file_and_epoch_each_give_another_order():
    orders = {
        tuple(_images(Permutation(50, round_keys(*key))).tolist())
        for key in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]
    }
    assert len(orders) == 4
    assert len(round_keys(1, "a", 0)) == NUM_ROUNDS


def test_values_fall_evenly_on_places():
    """Chi-square of place against value over many keys; 81 degrees of freedom, 5 sigma."""
    n, trials = 10, 4000
    table = np.zeros((n, n))
    for epoch in range(trials):
        table[np.arange(n), _images(Permutation(n, round_keys(3, "f", epoch)))] += 1
    chi_square = ((table - trials / n) ** 2 / (trials / n)).sum()
    assert chi_square < 81 + 5 * np.sqrt(2 * 81)


def test_neighbours_do_not_stay_neighbours():
    n = 30_000
    images = _images(Permutation(n, round_keys(5, "f", 0))).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.02
