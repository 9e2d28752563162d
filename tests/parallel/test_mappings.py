from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.parallel import mappings
from megatron.parallel.groups import SERIAL
from tests.parallel.axis import whole_world
from tests.spawn import run


def part(rank: int, salt: int = 0) -> Tensor:
    """What rank `rank` holds: (3, 8), another on each rank."""
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(100 * salt + rank))


def forward_and_backward(name: str) -> tuple[Tensor, Tensor]:
    """A mapping's output and input gradient; checks where it wrote: never into a gradient."""
    tp = whole_world()
    x = part(tp.rank).requires_grad_()
    grad = part(tp.rank, salt=1)
    y = getattr(mappings, name)(x, tp)
    y.backward(grad)
    assert torch.equal(grad, part(tp.rank, salt=1)) and x.grad is not None
    assert y.data_ptr() == x.data_ptr()  # nothing is copied on the way
    if name.startswith("copy"):
        assert torch.equal(x, part(tp.rank))
    return y.detach(), x.grad


def expected(name: str, ranks: int, rank: int) -> tuple[Tensor, Tensor]:
    total = [sum(part(i, salt=salt) for i in range(ranks)) for salt in (0, 1)]
    if name.startswith("copy"):
        return part(rank), total[1]
    return total[0], part(rank, salt=1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["copy_to_tensor_parallel", "reduce_from_tensor_parallel"])
def test_forward_and_backward(name: str, ranks: int) -> None:
    for rank, (y, grad) in enumerate(run(forward_and_backward, ranks, name)):
        want_y, want_grad = expected(name, ranks, rank)
        torch.testing.assert_close(y, want_y)
        torch.testing.assert_close(grad, want_grad)


def test_alone_every_mapping_is_the_identity() -> None:
    x = torch.ones(2, 2)
    for name in ("copy_to", "reduce_from"):
        assert getattr(mappings, f"{name}_tensor_parallel")(x, SERIAL) is x


def residual_branch() -> Tensor:
    tp = whole_world()
    x = torch.ones(2, requires_grad=True)
    (x + mappings.copy_to_tensor_parallel(x, tp)).sum().backward()
    assert x.grad is not None
    return x.grad


def test_a_shared_gradient_is_not_reduced_on_its_other_branch() -> None:
    assert all(torch.equal(grad, torch.full((2,), 3.0)) for grad in run(residual_branch, 2))
