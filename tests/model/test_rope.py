from __future__ import annotations

import math

import pytest
import torch

from megatron.config.rope_scaling import Llama3Scaling
from megatron.model.rope import (
    Rope,
    apply_rope,
    inverse_frequencies,
    rotary_tables,
    tables_for,
)

ROPE = Rope(head_dim=8, theta=10000.0)


def test_each_pair_of_coordinates_is_turned_by_its_angle() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    y = apply_rope(x, tables_for(ROPE, x))
    for position in range(5):
        for i in range(4):
            angle = position * 10000.0 ** (-2 * i / 8)
            first, second = x[:, :, position, i], x[:, :, position, i + 4]
            torch.testing.assert_close(
                y[:, :, position, i],
                first * math.cos(angle) - second * math.sin(angle),
                rtol=0,
                atol=1e-6,
            )
            torch.testing.assert_close(
                y[:, :, position, i + 4],
                second * math.cos(angle) + first * math.sin(angle),
                rtol=0,
                atol=1e-6,
            )


def test_scaling_keeps_high_frequencies_and_divides_low_ones() -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64
    )
    plain = inverse_frequencies(ROPE)
    scaled = inverse_frequencies(ROPE._replace(scaling=scaling))
    wavelengths = 2 * math.pi / plain  # 6.3, 63, 630, 6300
    assert [bool(w < 16) for w in wavelengths] == [True, False, False, False]
    assert scaled[0] == plain[0]
    assert plain[1] / 8 < scaled[1] < plain[1]
    assert torch.equal(scaled[2:], plain[2:] / 8)


def test_angles_are_fp32_whatever_the_dtype() -> None:
    positions = torch.tensor([100_000])
    exact, _ = rotary_tables(ROPE, positions, torch.float64)
    half, _ = rotary_tables(ROPE, positions, torch.bfloat16)
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=2**-8)


def test_tables_are_made_once() -> None:
    x = torch.randn(1, 1, 12, 8)
    assert tables_for(ROPE, x)[0] is tables_for(ROPE, x)[0]


@pytest.mark.parametrize("length", [33])
def test_tables_made_while_evaluating_serve_training(length: int) -> None:
    with torch.inference_mode():
        tables_for(ROPE, torch.randn(1, 1, length, 8))
    x = torch.randn(1, 1, length, 8, requires_grad=True)
    apply_rope(x, tables_for(ROPE, x)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(5, 8), (2, 1, 5, 8)])
def test_gradients_of_a_rotation_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    tables = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, tables), (x,))
