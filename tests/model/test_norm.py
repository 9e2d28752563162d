from __future__ import annotations

import torch

from megatron.model.norm import RMSNorm


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
