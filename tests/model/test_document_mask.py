"""Documents inside a sample: numbers, positions, masks, weights and scale, against plain loops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from megatron.config.layout import Layout
from megatron.model.attention import causal_attention
from megatron.model.document_mask import (
    DENSE,
    KERNELS,
    PLAIN,
    Documents,
    Kernel,
    document_numbers,
    document_positions,
    flex_kernel,
    follow_documents,
)
from megatron.model.layer import Layer, ModelContext
from megatron.model.registry import ARCHITECTURES
from megatron.parallel.groups import SERIAL, Groups, make_groups
from tests.model.tiny import TINY
from tests.spawn import run

EOD = 7


def tokens_of(seed: int, batch: int = 3, length: int = 40) -> Tensor:
    """(B, S) with ends of documents anywhere, side by side among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (batch, length), generator=generator)
    share = [0.0, 0.1, 0.5, 1.0][seed % 4]
    tokens[torch.rand(batch, length, generator=generator) < share] = EOD
    return tokens


def documents(**asked: bool) -> Documents:
    flags = {"own_attention": False, "own_positions": False, "mask_loss": False}
    return Documents(EOD, **{**flags, **asked})


@pytest.mark.parametrize("seed", range(8))
def test_numbers_and_positions(seed: int) -> None:
    tokens = tokens_of(seed)
    numbers, positions = document_numbers(tokens, EOD), document_positions(tokens, EOD)
    for row, number_row, position_row in zip(tokens, numbers, positions, strict=True):
        number = position = 0
        for token, got_number, got_position in zip(row, number_row, position_row, strict=True):
            assert (got_number, got_position) == (number, position)
            position += 1
            if token == EOD:
                number, position = number + 1, 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "kernel", [DENSE, PLAIN, flex_kernel(compiled=False)], ids=["dense", "plain", "flex"]
)
def test_attention_is_that_of_each_document_alone(kernel: Kernel, seed: int) -> None:
    tokens = tokens_of(seed, length=160)
    q, k, v = (torch.randn(3, heads, 160, 16) for heads in (4, 2, 2))
    got = kernel.attend(q, k, v, kernel.mask(document_numbers(tokens, EOD)))
    for sample in range(3):
        edges = [0, *(torch.nonzero(tokens[sample] == EOD).flatten() + 1).tolist(), 160]
        for first, last in pairwise(edges):
            if first == last:
                continue
            part = [x[sample : sample + 1, :, first:last] for x in (q, k, v)]
            alone = causal_attention(part[0], part[1], part[2], ())
            torch.testing.assert_close(got[sample : sample + 1, :, first:last], alone)


class OneHead(nn.Module):
    """A projection and attention within documents."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend, self.linear = attend, nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.linear(x).view(*x.shape[:2], -1, 16).transpose(1, 2)  # (B, 4, S, 16)
        y: Tensor = self.attend(heads, heads[:, :2], heads[:, 2:]).transpose(1, 2).flatten(2)
        return x + y


def test_a_compiled_block_follows_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all micro-batches, without a break: a mask is its argument."""
    monkeypatch.setitem(KERNELS, "cpu", lambda: flex_kernel(compiled=False))
    asked = documents(own_attention=True)
    block = OneHead(asked.attend)
    compiled = torch.compile(block, backend=(counted := CompileCounter()), fullgraph=True)
    x = torch.randn(3, 160, 64)
    for seed in range(4):
        asked.show(tokens_of(seed, length=160))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x))
    assert counted.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpu_attends_within_documents(dtype: torch.dtype, compiled: bool) -> None:
    """FlexAttention and its gradients, with grouped heads and a last block that is not full."""
    gpu, length = torch.device("cuda", 0), 1000
    asked = documents(own_attention=True)
    block = OneHead(asked.attend).to(gpu, dtype)
    torch._dynamo.reset()
    compute = torch.compile(block, fullgraph=True) if compiled else block
    x = torch.randn(3, length, 64, device=gpu, dtype=dtype)
    weight = block.linear.weight
    graphs = []
    for seed in range(4):
        tokens = tokens_of(seed, length=length).to(gpu)
        asked.show(tokens)
        y = compute(x)
        (found,) = torch.autograd.grad(y.square().mean(), weight)
        mask = DENSE.mask(document_numbers(tokens, EOD))
        plain = OneHead(partial(DENSE.attend, mask=mask)).to(gpu, dtype)
        plain.load_state_dict(block.state_dict())
        expected_y = plain(x)
        (expected,) = torch.autograd.grad(expected_y.square().mean(), plain.linear.weight)
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
        torch.testing.assert_close(y, expected_y, **close)
        assert (found - expected).norm() / expected.norm() < (1e-4 if close else 2e-2)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[3]  # no compilation after the second micro-batch


def alone() -> Groups:
    """The groups of one rank, without torch.distributed."""
    return Groups(Layout(), 0, SERIAL, SERIAL, SERIAL, SERIAL, SERIAL)


def test_each_micro_batch_has_its_own_mask_and_weights() -> None:
    asked = documents(own_attention=True, mask_loss=True)
    batches = [(tokens_of(seed), tokens_of(seed)) for seed in range(4)]
    q = torch.randn(3, 1, 40, 8)

    def attended(number: int) -> Tensor:
        mask = DENSE.mask(document_numbers(batches[number][0], EOD))
        return DENSE.attend(q, q, q, mask)

    seen = 0
    for number, _ in enumerate(asked.begin(batches, alone(), torch.device("cpu"))):
        torch.testing.assert_close(asked.attend(q, q, q), attended(number))
        seen += 1
    assert seen == 4
    for number in (2, 0, 3):  # a recomputed pass of an earlier one
        asked.select(number)
        torch.testing.assert_close(asked.attend(q, q, q), attended(number))
        assert torch.equal(asked.weights, (batches[number][0] != EOD).float())


def means_of(shares: list[float]) -> tuple[float, float]:
    """The engine's mean over 2 micro-batches and the data-parallel ranks, and the true one."""
    groups = make_groups(Layout(tp=1, pp=1, dp=len(shares), sp=1))
    asked = documents(mask_loss=True)
    kept, total, count, mean = [], 0.0, 0, 0.0
    for rank, share in enumerate(shares):
        for number in range(2):
            generator = torch.Generator().manual_seed(10 * rank + number)
            tokens = torch.where(torch.rand(3, 8, generator=generator) < share, EOD, 1)
            losses = torch.rand(3, 8, generator=generator)
            total += float(losses[tokens != EOD].sum())
            count += int((tokens != EOD).sum())
            if rank == groups.dp.rank:
                kept.append((tokens, losses))
    batches = asked.begin([(t, t) for t, _ in kept], groups, torch.device("cpu"))
    for (_, losses), _ in zip(kept, batches, strict=True):
        targets = asked.targets(torch.zeros_like(losses, dtype=torch.int64))
        assert targets.weights is not None and targets.scale is not None
        mean += float((losses * targets.weights).sum() * targets.scale) / 2
    value = torch.tensor(mean)
    torch.distributed.all_reduce(value)
    return float(value) / len(shares), total / max(count, 1)


@pytest.mark.parametrize("shares", [[0.1, 0.9], [1.0, 0.2], [1.0, 1.0]])
def test_the_mean_is_over_all_counted_tokens(shares: list[float]) -> None:
    for got, want in run(means_of, 2, shares):
        assert math.isclose(got, want, rel_tol=1e-6)


def test_a_block_with_its_own_attention_is_refused() -> None:
    layer = Layer("1", nn.Linear, lambda: nn.Linear(2, 2), recompute=True)
    for asked in ({"own_attention": True}, {"own_positions": True}):
        with pytest.raises(ValueError, match="RESET_ATTENTION_MASK and RESET_POSITION_IDS"):
            follow_documents(layer, documents(**asked)).build()
    follow_documents(layer, documents(mask_loss=True)).build()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_of_the_package_follows(architecture: str) -> None:
    shape = dataclasses.replace(TINY, seq_length=8)
    layers = ARCHITECTURES[architecture].layers(shape, ModelContext())
    asked = documents(own_attention=True, own_positions=True)
    changed = [follow_documents(layer, asked).build() for layer in layers]
    follows = [m for layer in changed for m in layer.modules() if "attend" in vars(m)]
    assert len(follows) == TINY.num_layers
    assert all(module.attend == asked.attend for module in follows)
