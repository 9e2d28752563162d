"""FP8: the matrix products of the blocks in 8 bits, by torchao, where the device multiplies them.

Weights, gradients and activations stay bf16; each product scales its two operands by their present
largest value and rounds them (weights and activations to e4m3, gradients to e5m2; rowwise: all to
e4m3). A rank scales its shard of a matrix by itself: finer than by the whole, and nothing is sent.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.model.layer import Layer
from megatron.parallel.layers import ColumnParallelLinear, MatMul, RowParallelLinear

log = logging.getLogger(__name__)

RECIPES = {"1": "tensorwise", "rowwise": "rowwise", "emulated": "tensorwise"}
"""FP8 -> torchao's recipe."""
FIRST_CAPABILITY = (8, 9)  # of NVIDIA: Ada and Hopper
FIRST_ROCM = ("gfx94", "gfx95")  # MI300 and MI350


def with_float8(run: RunConfig, layers: Sequence[Layer], device: torch.device) -> list[Layer]:
    """The layers, the products of their blocks as FP8 asks.

    Raises:
        ConfigError: the device has no fp8 products, or torchao is not installed.
    """
    chosen = run.train.float8
    if chosen == "0":
        return list(layers)
    if chosen != "emulated" and (problem := _lacking(device)):
        raise ConfigError(
            f"FP8={chosen}: {problem}. Unset FP8; FP8=emulated tries its losses on any device"
        )
    matmul = float8_matmul(chosen)
    version = importlib.metadata.version("torchao")
    log.info(f"FP8={chosen}: the blocks' matrix products by torchao {version}, {RECIPES[chosen]}")
    return [_multiplying(layer, matmul) if layer.recompute else layer for layer in layers]


def _lacking(device: torch.device) -> str:
    """Why the device does not multiply fp8; empty where it does."""
    if device.type != "cuda":
        return f"torch has no fast fp8 products for {device.type}"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "" if name.startswith(FIRST_ROCM) else f"{name} has no fp8 (MI300 is the first)"
    found = torch.cuda.get_device_capability(device)
    if found >= FIRST_CAPABILITY:
        return ""
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and "
        f"fp8 begins at {FIRST_CAPABILITY[0]}.{FIRST_CAPABILITY[1]}"
    )


def float8_matmul(chosen: str) -> MatMul:
    """The product of an activation and a weight, differentiable.

    Args:
        chosen: FP8, not 0.

    Raises:
        ConfigError: torchao is not installed, or is another one than this was written for.
    """
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
    except ImportError as error:
        raise ConfigError(
            f"FP8={chosen} needs torchao ({error}): python3 -m pip install torchao==0.18.0"
        ) from None
    config = Float8LinearConfig.from_recipe_name(RECIPES[chosen])
    config = dataclasses.replace(config, emulate=chosen == "emulated")
    # torchao's layer knows how its three products are computed; its weight is ours.
    how = Float8Linear(16, 16, bias=False, config=config, device="meta").linear_mm_config
    product: Callable[..., Any] = matmul_with_hp_or_float8_args.apply

    def matmul(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = product(x, weight.t(), how, config)
        return y

    return matmul


def _multiplying(layer: Layer, matmul: MatMul) -> Layer:
    """The layer, its sharded matrices multiplied by `matmul`."""

    def build() -> nn.Module:
        module = layer.build()
        for part in module.modules():
            if isinstance(part, ColumnParallelLinear | RowParallelLinear):
                part.matmul = matmul
        return module

    return dataclasses.replace(layer, build=build)
