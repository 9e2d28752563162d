"""Rotary position embedding as Hugging Face has it: coordinates i and i + D/2 are a pair.

Legend: B batch, N heads, S sequence, D head width.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.config.rope_scaling import Llama3Scaling
from megatron.model.fusion import materialized


class Rope(NamedTuple):
    """Everything the angles depend on."""

    head_dim: int
    theta: float
    scaling: Llama3Scaling | None = None


def inverse_frequencies(rope: Rope, device: torch.device | None = None) -> Tensor:
    """(D/2,) fp32 angles per position."""
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.int64, device=device).to(
        torch.float32
    )
    frequencies = 1.0 / (rope.theta ** (exponents / rope.head_dim))
    return frequencies if rope.scaling is None else _apply_llama3_scaling(frequencies, rope.scaling)


def _apply_llama3_scaling(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    longest_kept = scaling.original_length / scaling.high_freq_factor
    shortest_divided = scaling.original_length / scaling.low_freq_factor
    wavelengths = 2 * math.pi / frequencies
    divided = frequencies / scaling.factor
    kept_fraction = (scaling.original_length / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = (1 - kept_fraction) * divided + kept_fraction * frequencies
    result = torch.where(wavelengths > shortest_divided, divided, blend)
    return torch.where(wavelengths < longest_kept, frequencies, result)


def rotary_tables(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (S, D), for positions (S,); angles in fp32, then cast to `dtype`."""
    frequencies = inverse_frequencies(rope, positions.device)
    angles = positions.to(torch.float32)[:, None] * frequencies  # (S, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (S, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@functools.lru_cache(maxsize=8)
def _kept_tables(
    rope: Rope, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # A table first made in inference mode would be refused by every later backward.
    with torch.inference_mode(False), torch.no_grad():
        return rotary_tables(rope, torch.arange(length, device=device), dtype)


def tables_for(rope: Rope, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tables for the positions 0 .. S-1 of x (B, N, S, D), kept between calls.

    Args:
        rope: what the angles depend on.
        x: gives length, device and dtype.
    """
    length = x.shape[-2]
    # A graph has no cache. On a CPU it would compute the angles for each head and sample.
    if torch.compiler.is_compiling():
        cos, sin = rotary_tables(rope, torch.arange(length, device=x.device), x.dtype)
        return (materialized(cos), materialized(sin)) if x.device.type == "cpu" else (cos, sin)
    return _kept_tables(rope, length, x.device, x.dtype)


class _Rotation(Function):
    """Half the passes of the formula below, and none of its copies; keeps the tables only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (sin_1, sin_2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        y = x * cos
        y_1, y_2 = y.chunk(2, dim=-1)
        y_1.addcmul_(second, sin_1, value=-1)
        y_2.addcmul_(first, sin_2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (first, second), (sin_1, sin_2) = grad.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        x_grad = grad * cos
        x_1, x_2 = x_grad.chunk(2, dim=-1)
        x_1.addcmul_(second, sin_2)
        x_2.addcmul_(first, sin_1, value=-1)
        return x_grad, None, None


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates x (B, N, S, D) by the angles of the tables, each (S, D)."""
    cos, sin = tables
    if not torch.compiler.is_compiling():
        y: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return y
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
