from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.parallel.groups import Axis
from megatron.parallel.init import ROWS_PER_BLOCK, block_seed, sharded_normal_
from megatron.parallel.layers import sharded_weight


def whole(shape: tuple[int, int], name: str = "w", seed: int = 1, std: float = 0.1) -> torch.Tensor:
    return sharded_normal_(torch.full(shape, torch.nan), seed=seed, name=name, shape=shape, std=std)


def pretend_axis(size: int, rank: int) -> Axis:
    """Place `rank` of `size` without processes: enough until a layer communicates."""
    axis = object.__new__(Axis)
    for key, value in {
        "group": None,
        "rank": rank,
        "size": size,
        "ranks": tuple(range(size)),
    }.items():
        object.__setattr__(axis, key, value)
    return axis


@settings(deadline=None, max_examples=60)
@given(
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    dim=st.sampled_from([0, 1]),
    cut=st.integers(1, 70),
    other=st.integers(1, 300),
)
def test_slices_side_by_side_are_the_whole(tp: int, dim: int, cut: int, other: int) -> None:
    shape = (cut * tp, other) if dim == 0 else (other, cut * tp)
    slices = [
        sharded_weight(shape, dim, pretend_axis(tp, rank), seed=1, name="w", std=0.1).detach()
        for rank in range(tp)
    ]
    assert torch.equal(torch.cat(slices, dim), whole(shape))


@settings(deadline=None, max_examples=40)
@given(used=st.integers(1, 400), padding=st.integers(0, 300), tp=st.sampled_from([1, 2, 4]))
def test_padding_is_zero_and_changes_no_other_row(used: int, padding: int, tp: int) -> None:
    rows = -(-(used + padding) // tp) * tp
    slices = [
        sharded_weight(
            (rows, 5), 0, pretend_axis(tp, rank), seed=1, name="w", std=0.1, used_rows=used
        ).detach()
        for rank in range(tp)
    ]
    full = torch.cat(slices)
    assert torch.equal(full[:used], whole((used, 5)))
    assert torch.count_nonzero(full[used:]) == 0


def test_numbers_depend_on_seed_and_name_and_block_only() -> None:
    rows = 2 * ROWS_PER_BLOCK
    base = whole((rows, 16))
    assert torch.equal(base, whole((rows, 16)))
    assert not torch.equal(base, whole((rows, 16), name="v"))
    assert not torch.equal(base, whole((rows, 16), seed=2))
    assert not torch.equal(base[:ROWS_PER_BLOCK], base[ROWS_PER_BLOCK:])
    torch.manual_seed(5)
    assert torch.equal(base, whole((rows, 16)))  # nothing is taken from the global generator


def test_the_seed_of_a_block_is_the_same_everywhere() -> None:
    # sha256("1234/0.weight/0"), first eight bytes, little endian, signed.
    assert block_seed(1234, "0.weight", 0) == 1259405521329665206


def test_the_distribution() -> None:
    sample = whole((512, 512), std=0.02)
    assert abs(float(sample.mean())) < 5 * 0.02 / 512
    assert math.isclose(float(sample.std()), 0.02, rel_tol=0.01)


def test_a_lower_precision_is_the_cast_of_fp32() -> None:
    out = torch.empty(200, 7, dtype=torch.bfloat16)
    sharded_normal_(out, seed=1, name="w", shape=(200, 7), std=0.1)
    assert torch.equal(out, whole((200, 7)).bfloat16())


def test_meta_tensors_are_not_drawn() -> None:
    with torch.device("meta"):
        weight = sharded_weight((10**7, 10**5), 0, pretend_axis(2, 1), seed=1, name="w", std=0.1)
    assert weight.is_meta and weight.shape == (5 * 10**6, 10**5)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dimension 1 of w=10 is not a multiple of TP=4"):
        sharded_weight((8, 10), 1, pretend_axis(4, 0), seed=1, name="w", std=0.1)
