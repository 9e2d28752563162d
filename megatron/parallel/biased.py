"""Sharded linear layers with a bias, and weights that every tensor-parallel rank holds whole.

Legend: B batch, S sequence, s = S/tp with sequence_parallel, else S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linears,
    set_tensor_parallel_attributes,
    shard_size,
)
from megatron.parallel.mappings import copy_to_tensor_parallel
from megatron.parallel.partial_gradients import is_partial


class ReplicatedWeights(nn.Module):
    """A module with weights that all ranks hold whole.

    No communication: where the ranks apply them to different vectors, each has a part of their
    gradients, and the engine sums the parts once per step (`parallel/partial_gradients.py`).
    """

    axis: Axis = SERIAL  # its ranks hold different vectors; SERIAL: all hold the same
    summed: Axis = SERIAL  # over this axis the backward pass sums the gradients

    def replicated(self, value: Tensor) -> nn.Parameter:
        """A parameter with this value, equal on all ranks."""
        parameter = nn.Parameter(value)
        set_tensor_parallel_attributes(parameter, tuple(value.shape), None)
        parameter.tp_partial_grad = self.axis.size > 1  # type: ignore[attr-defined]
        return parameter

    def sum_in_backward(self) -> None:
        """For an engine that cannot sum: an all-reduce in each backward pass from now on."""
        for parameter in self.parameters(recurse=False):
            if is_partial(parameter):
                parameter.tp_partial_grad = False  # type: ignore[attr-defined]
        self.summed = self.axis

    def applied(self, parameter: Tensor) -> Tensor:
        """The parameter as a forward pass uses it."""
        return copy_to_tensor_parallel(parameter, self.summed)


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """y = x W^T + b; rows of W and elements of b sharded: x (B, s, in) -> y (B, S, out/tp)."""

    def __init__(self, in_features: int, out_features: int, tp: Axis, **options: Any) -> None:
        super().__init__(in_features, out_features, tp, **options)
        local = torch.zeros(shard_size(out_features, tp, "a layer's outputs"))
        self.bias = set_tensor_parallel_attributes(nn.Parameter(local), (out_features,), 0)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, s, in) -> this rank's (B, S, out/tp)."""
        return super().forward(x) + self.bias


def biased_linears(x: Tensor, layers: Sequence[BiasedColumnParallelLinear]) -> tuple[Tensor, ...]:
    """x (B, s, in) through several layers of one axis, which communicate as one."""
    if layers[0].tp.size == 1:
        return tuple(layer(x) for layer in layers)
    products = column_parallel_linears(x, layers)
    return tuple(y + layer.bias for y, layer in zip(products, layers, strict=True))


class BiasedRowParallelLinear(RowParallelLinear, ReplicatedWeights):
    """y = x W^T + b, columns of W sharded, b whole on each rank: x (B, S, in/tp) -> y (B, s, out).

    The bias is added once, after the sum over the ranks.
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis, **options: Any) -> None:
        super().__init__(in_features, out_features, tp, **options)
        self.axis = tp if self.sequence_parallel else SERIAL
        self.bias = self.replicated(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """This rank's x (B, S, in/tp) -> (B, s, out); without sequence_parallel equal on all."""
        return super().forward(x) + self.applied(self.bias)
