"""The likeliest token over the shards of a vocabulary, and the share of those that are right."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.parallel.control import ALONE, make_control
from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.head_loss import Targets, head_loss
from megatron.training.accuracy import Accuracy, likeliest
from tests.parallel.axis import whole_world
from tests.spawn import run

V, T = 24, 50


def logits() -> torch.Tensor:
    """Half of the rows have ties of the largest, some of them on other ranks."""
    return torch.randint(0, 3, (T, V), generator=torch.Generator().manual_seed(1)).bfloat16()


def found(ranks: int) -> list[int]:
    tp: Axis = whole_world()
    own = logits().chunk(ranks, dim=1)[tp.rank].contiguous()
    return likeliest(own, tp).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_lowest_of_the_largest(ranks: int) -> None:
    first = [row.index(max(row)) for row in logits().tolist()]
    assert run(found, ranks, ranks) == [first] * ranks


def share(weighted: bool) -> float:
    tp = whole_world()
    hidden = torch.randn(2, T // 2, 8, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(V, 8, generator=torch.Generator().manual_seed(3))
    right = (hidden @ weight.T).argmax(-1)
    right[:, ::3] = 0
    weights = torch.ones(2, T // 2)
    weights[0] = 0
    accuracy = Accuracy(tp, V)
    targets = accuracy.counted(lambda x: Targets(x, weights if weighted else None))(right)
    own = weight.chunk(tp.size)[tp.rank].contiguous()
    head_loss(hidden, own, targets, tp, V)
    return accuracy.share(make_control())


def test_the_share_of_the_tokens_that_count() -> None:
    for weighted in (False, True):
        hidden = torch.randn(2, T // 2, 8, generator=torch.Generator().manual_seed(2))
        weight = torch.randn(V, 8, generator=torch.Generator().manual_seed(3))
        likely = (hidden @ weight.T).argmax(-1)
        right = likely.clone()
        right[:, ::3] = 0
        kept = (likely == right)[1:] if weighted else likely == right
        for ranks in (1, 2):
            assert (
                run(share, ranks, weighted) == [pytest.approx(float(kept.float().mean()))] * ranks
            )


def test_nothing_counted_is_nan() -> None:
    assert math.isnan(Accuracy(SERIAL, V).share(ALONE))


def test_a_label_outside_is_refused_as_in_training() -> None:
    targets = Accuracy(SERIAL, V).counted(Targets)
    with pytest.raises(ValueError, match="label"):
        targets(torch.tensor([[V]]))
