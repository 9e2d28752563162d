"""The weight's gradient in blocks of tokens: as exact as one product, and only where it gains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.parallel import linear as file
from megatron.parallel.linear import BLOCKS, LEAST_TOKENS, linear_in_a_graph, weight_gradient

OUT, IN = 24, 16


class Products(TorchDispatchMode):
    """Counts batched products."""

    batched = most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.bmm.default:
            self.batched, self.most = self.batched + 1, max(self.most, len(args[0]))
        return func(*args, **(kwargs or {}))


def drawn(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs' gradients and inputs."""
    generator = torch.Generator().manual_seed(tokens)
    grad, x = (torch.randn(tokens, width, generator=generator) for width in (OUT, IN))
    return grad.to(dtype), x.to(dtype)


@pytest.fixture
def in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a graph were traced, on a CPU with matrix units."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(file, "multiplies_bf16", lambda: True)


@pytest.mark.usefixtures("in_a_graph")
@pytest.mark.parametrize("blocks", BLOCKS)
def test_blocks_of_tokens_round_no_more_than_twice_one_product(blocks: int) -> None:
    grad, x = drawn(blocks * LEAST_TOKENS, torch.bfloat16)
    exact = grad.double().t() @ x.double()
    with Products() as products:
        found = weight_gradient(grad, x)
    assert products.batched == 1 and found.dtype == torch.bfloat16
    assert products.most == blocks
    ours, whole = (float((y.double() - exact).norm()) for y in (found, grad.t() @ x))
    assert ours < 2 * whole


@pytest.mark.usefixtures("in_a_graph")
@pytest.mark.parametrize(
    ("tokens", "dtype", "matrix_units"),
    [
        (2048, torch.float32, True),
        (2047, torch.bfloat16, True),
        (1022, torch.bfloat16, True),  # too few
        (2048, torch.bfloat16, False),
    ],
)
def test_else_it_is_one_product(
    tokens: int, dtype: torch.dtype, matrix_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "multiplies_bf16", lambda: matrix_units)
    grad, x = drawn(tokens, dtype)
    with Products() as products:
        assert torch.equal(weight_gradient(grad, x), grad.t() @ x)
    assert products.batched == 0


def test_eager_it_is_torchs() -> None:
    grad, x = drawn(2 * LEAST_TOKENS, torch.bfloat16)
    with Products() as products:
        y = linear_in_a_graph(x, torch.ones(OUT, IN, dtype=torch.bfloat16, requires_grad=True))
        y.backward(grad)
        weight_gradient(grad, x)
    assert products.batched == 0


def test_a_graph_has_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "multiplies_bf16", lambda: True)
    grad, x = drawn(2 * LEAST_TOKENS, torch.bfloat16)
    grad, x = grad.view(2, -1, OUT), x.view(2, -1, IN).requires_grad_()
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight.requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for function in (linear_in_a_graph, torch.compile(linear_in_a_graph, backend=counter)):
        y = function(x, weight)
        results.append([y.detach(), *torch.autograd.grad(y, (x, weight), grad)])
    assert counter.frame_count == 1
    eager, compiled = results
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])
    distance = (eager[2].double() - compiled[2].double()).norm() / eager[2].double().norm()
    assert 0 < float(distance) < 2**-8  # of blocks
