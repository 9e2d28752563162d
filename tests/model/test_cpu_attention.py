"""The attention's own backward on a CPU against torch's, in fp32 and beside bf16's rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megatron.model import cpu_attention
from megatron.model.attention import causal_attention

SHAPES = ((2, 4, 2, 384, 16), (1, 3, 3, 128, 32), (1, 4, 2, 512, 64))
"""B, N, K, S, D: grouped heads over three blocks of queries, one block, and two of bf16's."""


def drawn(shape: tuple[int, ...], dtype: torch.dtype, spread: float) -> list[Tensor]:
    """q, k, v as a layer makes them, (B, heads, S, D) of (B, S, heads, D); scores spread widely."""
    batch, heads, kv_heads, length, width = shape
    torch.manual_seed(1)
    return [
        (torch.randn(batch, length, n, width) * factor).to(dtype).transpose(1, 2).requires_grad_()
        for n, factor in ((heads, spread), (kv_heads, 1.0), (kv_heads, 1.0))
    ]


def results(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    grad = torch.randn(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def exact(inputs: list[Tensor]) -> list[Tensor]:
    """In fp64, of the same inputs."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = wide
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.manual_seed(2)
    grad = torch.randn(y.shape).to(inputs[0].dtype).double()
    return [y.detach(), *torch.autograd.grad(y, wide, grad)]


def distances(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_is_exact(shape: tuple[int, ...]) -> None:
    inputs = drawn(shape, torch.float32, 1.0)
    found = results(cpu_attention.causal_attention(*inputs), inputs)
    assert max(distances(found, exact(inputs))) < 2e-6


@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_rounds_no_more_than_torchs_kernel(shape: tuple[int, ...], spread: float) -> None:
    """Also where scores are large, which products that round them to bf16 would not pass."""
    inputs = drawn(shape, torch.bfloat16, spread)
    wanted = exact(inputs)
    q, k, v = inputs
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    theirs = distances(results(torchs, inputs), wanted)
    ours = distances(results(cpu_attention.causal_attention(q, k, v), inputs), wanted)
    assert all(a < max(1.6 * b, 6e-3) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_rounds_no_more_and_keeps_no_scores(dtype: torch.dtype) -> None:
    """It may leave out a conversion to bf16 and back, and take two equal products for one."""
    inputs = drawn(SHAPES[2], dtype, 3.0)
    eager = results(cpu_attention.causal_attention(*inputs), inputs)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        y = torch.compile(cpu_attention.causal_attention)(*inputs)
    wanted, found = exact(inputs), results(y, inputs)
    ratios = [
        a / b for a, b in zip(distances(found, wanted), distances(eager, wanted), strict=True)
    ]
    assert max(ratios) < 1.2, ratios
    # The scores alone would be 1.7 times as much in fp32.
    assert sum(x.nbytes for x in kept) < 2 * sum(x.nbytes for x in (*inputs, y))


@pytest.mark.long
def test_a_block_traces_it_in_one_graph() -> None:
    inputs = drawn(SHAPES[0], torch.float32, 1.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: causal_attention(q, k, v, ()), backend=counter)
    found = results(compiled(*inputs), inputs)
    assert counter.frame_count == 1
    assert any("_CausalAttention" in str(node) or "autograd" in str(node.target)
               for graph in counter.graphs for node in graph.graph.nodes)  # fmt: skip
    assert max(distances(found, exact(inputs))) < 2e-6


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q = drawn(SHAPES[0], torch.float32, 1.0)[0]
    assert cpu_attention.takes(q)
    assert not cpu_attention.takes(q[:, :, :100])
    assert not cpu_attention.takes(q.half())
    assert not cpu_attention.takes(q.to("meta"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not cpu_attention.takes(q.bfloat16())
