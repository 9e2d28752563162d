"""RMSNorm: x / rms(x) * weight, in fp32 inside whatever the dtype outside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.layers import mark
from megatron.parallel.mappings import copy_to_tensor_parallel


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; every tensor-parallel rank holds the whole weight.

    Forward: no communication. Backward: where the positions are cut, one all-reduce of the weight's
    gradient: each rank's is that of its own positions, and whoever takes norms and steps must find
    the same weight with the same gradient on all ranks.
    """

    def __init__(self, size: int, eps: float, cut: Axis = SERIAL) -> None:
        """Args: cut is the tensor-parallel axis where it cuts the positions, else one rank."""
        super().__init__()
        self.size = size
        self.eps = eps
        self.cut = cut
        self.weight = mark(nn.Parameter(torch.ones(size)), (size,), partition_dim=None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> (..., size)."""
        weight = copy_to_tensor_parallel(self.weight, self.cut)
        return F.rms_norm(x, (self.size,), weight, self.eps)
