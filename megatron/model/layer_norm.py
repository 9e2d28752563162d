"""LayerNorm: (x - mean) / deviation * weight + bias over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.parallel.biased import ReplicatedWeights
from megatron.parallel.groups import SERIAL, Axis


class LayerNorm(ReplicatedWeights):
    """Weight and bias are replicated over the tensor-parallel ranks."""

    def __init__(self, size: int, eps: float, axis: Axis = SERIAL) -> None:
        """Builds the weight, all ones, and the bias, all zeros.

        Args:
            size: of the last dimension.
            eps: added to the variance.
            axis: whose ranks norm different positions; SERIAL where all norm the same.
        """
        super().__init__()
        self.size, self.eps, self.axis = size, eps, axis
        self.weight = self.replicated(torch.ones(size))
        self.bias = self.replicated(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> (..., size)."""
        weight, bias = self.applied(self.weight), self.applied(self.bias)
        return F.layer_norm(x, (self.size,), weight, bias, self.eps)
