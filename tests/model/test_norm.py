from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.model.norm import RMSNorm, rms_norm


def test_the_formula() -> None:
    norm = RMSNorm(16, eps=1e-3)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(3, 4, 16)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)


def test_bf16_is_computed_in_fp32() -> None:
    norm = RMSNorm(512, eps=1e-5)
    x = (100 * torch.randn(4, 512)).bfloat16()
    exact = norm(x.float())
    y = norm.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    # One rounding to bf16 (2^-9 relative), none on the way.
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=0)


def test_the_weight_is_not_marked_as_cut() -> None:
    weight = RMSNorm(16, eps=1e-5).weight
    assert weight.full_shape == (16,)
    assert not getattr(weight, "tensor_model_parallel", False)


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x, weight, 1e-3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_are_torchs(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(2, 7, 64, generator=generator).to(dtype) for _ in range(2))
    weight = (0.5 + torch.rand(64, generator=generator)).to(dtype)
    results = []
    for function in (rms_norm, lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = function(*leaves, 1e-5)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_one_tensor_as_large_as_the_input_is_made() -> None:
    x = torch.randn(64, 256, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], id):
        rms_norm(x, torch.ones(256, requires_grad=True), 1e-5)
    assert sum(kept) == x.numel() + 256 + 64  # input, weight, one number a vector
