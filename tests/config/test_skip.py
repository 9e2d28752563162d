"""Ranges of steps to skip: parsing, merging and lookup against plain sets."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.config.skip import is_skipped, parse_ranges, ranges_text, skipped_before

PAIRS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 9)).map(lambda pair: (pair[0], sum(pair))),
    max_size=8,
)


@given(PAIRS, st.booleans())
def test_against_a_set(pairs, dashes):
    joined = "{}-{}," if dashes else "{} {} "
    ranges = parse_ranges("".join(joined.format(*pair) for pair in pairs))
    steps = {step for first, last in pairs for step in range(first, last + 1)}
    for step in range(1, 75):
        assert is_skipped(step, ranges) == (step in steps)
        assert skipped_before(step, ranges) == len([other for other in steps if other < step])
    assert parse_ranges(ranges_text(ranges)) == ranges
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(ranges))


def test_forms(tmp_path):
    expected = ((10, 20), (25, 30))
    (tmp_path / "ranges").write_text("25-30  # the second spike\n\n10 20\n")
    for text in ("10 20 25 30", "10-20,25-30", "25-30 10 20", f"@{tmp_path / 'ranges'}"):
        assert parse_ranges(text) == expected
    assert parse_ranges("") == ()


@pytest.mark.parametrize(
    "text", ["10", "10 20 25", "20 10", "0 5", "0-5", "a b", "5-", "-5", "1.5 2", "@no/such"]
)
def test_wrong_ranges_name_the_variable(text):
    with pytest.raises(ConfigError, match="--skip"):
        parse_ranges(text, "--skip")
