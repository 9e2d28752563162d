"""The parts of Megatron's order by themselves: splits, requests, epochs, the sample index."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import DataError
from megatron.data.megatron_order import requests
from megatron.data.megatron_order.epochs import NO_EPOCHS, plan_epochs
from megatron.data.megatron_order.file_index import sample_index, shuffle_dtype
from megatron.data.megatron_order.mixing import corpus_order, corpus_weights
from megatron.data.megatron_order.requests import split_documents, split_text
from tests.data.slow_order import boundaries, greedy, pairwise_sum


@given(st.tuples(*[st.integers(0, 1000)] * 3).filter(lambda s: s[0]), st.integers(0, 10**6))
def test_splits_are_those_of_the_rules(shares, documents):
    ranges = split_documents(shares, documents)
    bounds = boundaries(shares, documents)
    assert [(r.start, r.stop) for r in ranges] == [
        (bounds[0], bounds[1]), (bounds[1], bounds[2]), (bounds[2], bounds[3])
    ]  # fmt: skip
    assert ranges[2].stop == documents


def test_halves_are_rounded_to_even_and_the_surplus_is_taken_from_all():
    # 2.5 + 2.5 of 5 documents round to 2 + 2: one is missing, and all boundaries move up.
    assert split_documents((1, 1, 0), 5) == (range(3), range(3, 5), range(5, 5))
    # 1.5 + 1.5 of 3 round to 2 + 2: one too many.
    assert split_documents((1, 1, 0), 3) == (range(1), range(1, 3), range(3, 3))


@pytest.mark.parametrize("shares", [(0, 0, 0), (-1, 2, 0), (float("inf"), 1, 0)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(DataError, match="TRAIN_SPLIT"):
        split_documents(shares, 10)


def test_a_split_of_less_than_nothing_is_refused():
    with pytest.raises(DataError, match="raise TRAIN_SPLIT"):
        split_documents((0, 1, 1), 3)


def test_split_text():
    assert split_text((990, 10.0, 0)) == "990,10,0"
    assert split_text((98.5, 1.0, 0.5)) == "98.5,1,0.5"


def test_the_products_of_a_request_are_rounded_in_order():
    share, wanted = 0.002985074626865672, 1000
    assert share + (1 - share) == 1
    assert requests.file_requests([share, 1 - share], wanted)[0] == 4
    # Any other grouping of the three factors gives one sample less.
    assert math.ceil(wanted * (share * 1.005)) == math.ceil(wanted * 1.005 * share) == 3


def test_the_sum_of_weights_carries_no_rounding():
    weights = [1.0, *[1e-16] * 10]
    assert requests.plain_sum(weights) == 1.0  # Python 3.12's sum gives 1.000000000000001


def test_weights_that_are_none_are_refused():
    for weights in ([0.0, 0.0], [1.0, -0.5], [float("nan")]):
        with pytest.raises(DataError, match="weights"):
            requests.file_requests(weights, 10)


def test_without_evaluation_only_training_is_asked_for():
    assert requests.samples_wanted(100, 8, 0, 20) == (800, 0, 0)
    assert requests.samples_wanted(100, 8, 30, 5) == (800, 4 * 5 * 8, 5 * 8)


@given(st.integers(1, 500), st.integers(1, 40), st.integers(0, 3000))
def test_epochs_are_the_fewest(tokens, seq, wanted):
    epochs = plan_epochs(tokens, seq, wanted, "f")
    assert epochs.samples == (epochs.passes * tokens - 1) // seq >= wanted
    assert epochs.passes == 1 or ((epochs.passes - 1) * tokens - 1) // seq < wanted
    assert epochs.joint_samples <= epochs.samples


def test_epochs_without_tokens():
    assert plan_epochs(0, 8, 0, "f") == NO_EPOCHS
    with pytest.raises(DataError, match="f holds documents but no tokens"):
        plan_epochs(0, 8, 1, "f")


def test_exact_epochs():
    needed = plan_epochs(100, 10, 25, "f")
    assert needed.passes == 3 and plan_epochs(100, 10, 25, "f", exact=3) == needed
    # 19 samples are exactly those of 2 epochs: a third is allowed, and is shuffled apart.
    assert plan_epochs(100, 10, 19, "f", exact=3) == (3, True, 29, 19)
    for exact in (1, 2, 4):
        with pytest.raises(DataError, match=f"EPOCHS={exact}: f needs 3 epochs"):
            plan_epochs(100, 10, 25, "f", exact=exact)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(any),
    seq=st.integers(1, 20),
    block=st.integers(1, 70),
)
def test_the_sample_index_does_not_depend_on_its_blocks(lengths, seq, block):
    order = np.random.RandomState(len(lengths)).permutation(len(lengths)).astype(np.int32)
    sizes = np.array(lengths, dtype=np.int32)
    samples = (sum(lengths) - 1) // seq
    rows = np.concatenate(list(sample_index(order, sizes, seq, samples, block)))
    stream = [(place, i) for place, d in enumerate(order) for i in range(lengths[d])]
    assert rows.tolist() == [[0, 0], *(list(stream[k * seq]) for k in range(1, samples + 1))]


def test_sample_numbers_widen_at_the_limit():
    assert [shuffle_dtype(n).str for n in (0, 2**32 - 3, 2**32 - 2)] == ["<u4", "<u4", "<i8"]


@pytest.mark.parametrize("count", [1, 7, 8, 11, 14, 130, 1000])
def test_corpus_weights_are_added_pairwise(count):
    sizes = np.random.RandomState(count).randint(1, 10**6, size=count).tolist()
    weights = [size / 12345 for size in sizes]
    total = pairwise_sum(weights)
    assert corpus_weights(sizes, 12345).tolist() == [weight / total for weight in weights]


def test_shares_within_a_corpus_are_not_normalised_again():
    shares = np.array([4, 1, 1]) / 6
    assert greedy(shares.tolist(), 6) != greedy((shares / shares.sum()).tolist(), 6)
    (picks,) = corpus_order([4, 1, 1], [9, 9, 9], blended=True, shuffled=False, seed=0)
    found = list(zip(picks.sources.tolist(), picks.numbers.tolist(), strict=True))
    assert found == greedy(shares.tolist(), 6)
