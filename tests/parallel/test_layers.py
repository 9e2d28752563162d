from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from tests.parallel.axis import whole_world
from tests.spawn import RankError, run

DRAWN = {"seed": 3, "name": "w", "std": 0.5}
IN, OUT, VOCAB, PADDED = 12, 8, 10, 16


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, IN, generator=generator), torch.randn(2, 3, OUT, generator=generator)


def tokens() -> Tensor:
    return torch.arange(20).remainder(VOCAB).view(4, 5)


def column(tp: Axis) -> tuple[Tensor, Tensor, Tensor]:
    x, grad = inputs()
    layer = ColumnParallelLinear(IN, OUT, tp, **DRAWN)
    x.requires_grad_()
    y = layer(x)  # own outputs
    y.backward(grad.chunk(tp.size, -1)[tp.rank])
    return y.detach(), x.grad, layer.weight.grad


def row(tp: Axis) -> tuple[Tensor, Tensor, Tensor]:
    x, grad = inputs()
    layer = RowParallelLinear(IN, OUT, tp, **DRAWN)
    x.requires_grad_()
    y = layer(x.chunk(tp.size, -1)[tp.rank])  # own inputs
    y.backward(grad)
    return y.detach(), x.grad, layer.weight.grad


def embedding(tp: Axis) -> tuple[Tensor, Tensor, Tensor]:
    layer = VocabParallelEmbedding(VOCAB, PADDED, OUT, tp, **DRAWN)
    y = layer(tokens())
    y.pow(2).sum().backward()
    return y.detach(), torch.zeros(()), layer.weight.grad


def on_ranks(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    return {"column": column, "row": row, "embedding": embedding}[kind](whole_world())


def serial(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch's own layers."""
    x, grad = inputs()
    x.requires_grad_()
    if kind == "embedding":
        weight = VocabParallelEmbedding(VOCAB, PADDED, OUT, SERIAL, **DRAWN).weight
        weight = weight.detach().clone().requires_grad_()
        y = F.embedding(tokens(), weight)
        y.pow(2).sum().backward()
        return y.detach(), torch.zeros(()), weight.grad
    layer = nn.Linear(IN, OUT, bias=False)
    ours = ColumnParallelLinear(IN, OUT, SERIAL, **DRAWN)
    layer.weight.data.copy_(ours.weight.data)
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("kind", "dim"), [("column", 0), ("row", 1), ("embedding", 0)])
def test_output_and_gradients_are_those_of_the_serial_layer(
    kind: str, dim: int, ranks: int
) -> None:
    want_y, want_x_grad, want_weight_grad = serial(kind)
    results = run(on_ranks, ranks, kind)
    outputs, x_grads = [y for y, _, _ in results], [grad for _, grad, _ in results]
    if kind == "column":
        outputs = [torch.cat(outputs, -1)]
    if kind == "row":
        x_grads = [sum(x_grads)]  # each has those of its own inputs
    assert all(torch.allclose(y, want_y, atol=1e-6) for y in outputs)
    assert all(torch.allclose(grad, want_x_grad, atol=1e-6) for grad in x_grads)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in results], dim), want_weight_grad)


def test_marks() -> None:
    column = ColumnParallelLinear(IN, OUT, SERIAL, **DRAWN).weight
    row = RowParallelLinear(IN, OUT, SERIAL, **DRAWN).weight
    embedding = VocabParallelEmbedding(VOCAB, PADDED, OUT, SERIAL, **DRAWN).weight
    assert [w.partition_dim for w in (column, row, embedding)] == [0, 1, 0]
    assert [w.full_shape for w in (column, row, embedding)] == [(OUT, IN), (OUT, IN), (PADDED, OUT)]
    assert all(w.tensor_model_parallel is True for w in (column, row, embedding))


def look_up(token: int) -> None:
    VocabParallelEmbedding(VOCAB, PADDED, OUT, whole_world(), **DRAWN)(torch.tensor([[0, token]]))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("token", [-1, VOCAB, PADDED, 10**9])
def test_a_token_outside_the_vocabulary_raises_at_every_size(token: int, ranks: int) -> None:
    with pytest.raises(
        RankError, match=rf"token id {token} is outside the vocabulary \[0, {VOCAB}\)"
    ):
        run(look_up, ranks, token)
