"""RMSNorm: x / rms(x) * weight, in fp32 inside whatever the dtype outside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.layers import set_tensor_parallel_attributes
from megatron.parallel.mappings import copy_to_tensor_parallel


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; the weight is replicated over the tensor-parallel ranks.

    Forward: no communication. Backward: one all-reduce of the weight's gradient where the ranks
    norm different vectors: clipping and the optimizer need identical gradients on all of them.
    """

    def __init__(self, size: int, eps: float, tp: Axis = SERIAL) -> None:
        """Builds the weight, all ones.

        Args:
            size: of the last dimension.
            eps: added to the mean square.
            tp: axis whose ranks norm different vectors (positions or heads); SERIAL where all
                norm the same.
        """
        super().__init__()
        self.size = size
        self.eps = eps
        self.tp = tp
        self.weight = set_tensor_parallel_attributes(nn.Parameter(torch.ones(size)), (size,), None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> (..., size)."""
        weight = copy_to_tensor_parallel(self.weight, self.tp)
        return F.rms_norm(x, (self.size,), weight, self.eps)
