from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.parallel.groups import SERIAL
from megatron.parallel.sequence import gathered_linear, reduce_scatter_positions
from tests.parallel.axis import whole_world
from tests.spawn import run

B, S, IN = 2, 8, 6
OUT = (4, 8)  # of two matrices that read the same x


def drawn(salt: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(salt))


def own(x: Tensor, dim: int) -> Tensor:
    rank, size = dist.get_rank(), dist.get_world_size()
    return x.chunk(size, dim)[rank].clone()


def scattered_sum() -> tuple[Tensor, Tensor]:
    tp = whole_world()
    x = drawn(tp.rank, B, S, IN).requires_grad_()
    y = reduce_scatter_positions(x, tp)
    y.backward(own(drawn(10, B, S, IN), 1))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_reduce_scatter_and_its_gradient(ranks: int) -> None:
    total = torch.stack([drawn(rank, B, S, IN) for rank in range(ranks)]).sum(0)
    results = run(scattered_sum, ranks)
    torch.testing.assert_close(torch.cat([y for y, _ in results], 1), total)
    for _, gradient in results:
        torch.testing.assert_close(gradient, drawn(10, B, S, IN))


def products() -> dict[str, Tensor]:
    """Own columns of both products, own positions of x's gradient, own rows of the weights'."""
    tp = whole_world()
    x = own(drawn(0, B, S, IN), 1).requires_grad_()
    weights = [own(drawn(1 + i, out, IN), 0).requires_grad_() for i, out in enumerate(OUT)]
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        ys = gathered_linear(x, weights, tp)
    if tp.size > 1:
        assert (B, S, IN) not in kept and (B * S, IN) not in kept
    torch.autograd.backward(ys, [own(drawn(5 + i, B, S, out), 2) for i, out in enumerate(OUT)])
    result = {"x": x.grad}
    for i, (y, weight) in enumerate(zip(ys, weights, strict=True)):
        result |= {f"y{i}": y.detach(), f"w{i}": weight.grad}
    return result  # type: ignore[return-value]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gathered_linear_is_the_whole_product_and_keeps_only_its_positions(ranks: int) -> None:
    x = drawn(0, B, S, IN).requires_grad_()
    weights = [drawn(1 + i, out, IN).requires_grad_() for i, out in enumerate(OUT)]
    ys = [F.linear(x, weight) for weight in weights]
    torch.autograd.backward(ys, [drawn(5 + i, B, S, out) for i, out in enumerate(OUT)])
    results = run(products, ranks)

    def together(name: str, dim: int) -> Tensor:
        return torch.cat([result[name] for result in results], dim)

    torch.testing.assert_close(together("x", 1), x.grad)
    for i, (y, weight) in enumerate(zip(ys, weights, strict=True)):
        torch.testing.assert_close(together(f"y{i}", 2), y)
        torch.testing.assert_close(together(f"w{i}", 0), weight.grad)


def test_alone_nothing_is_communicated() -> None:
    x = torch.ones(1, 4, 2)
    assert reduce_scatter_positions(x, SERIAL) is x
    (y,) = gathered_linear(x, [torch.ones(3, 2)], SERIAL)
    torch.testing.assert_close(y, torch.full((1, 4, 3), 2.0))


def unequal() -> None:
    reduce_scatter_positions(torch.zeros(1, 5, 2), whole_world())


def test_unequal_shares_of_the_positions_are_refused() -> None:
    with pytest.raises(RuntimeError, match="5 positions over 2 ranks"):
        run(unequal, 2)
