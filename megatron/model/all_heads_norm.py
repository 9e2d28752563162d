"""RMSNorm over all heads of a token, as OLMo 2 norms queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.model.norm import rms_norm
from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.layers import set_tensor_parallel_attributes, shard_size
from megatron.parallel.mappings import copy_to_tensor_parallel, reduce_from_tensor_parallel


class AllHeadsRMSNorm(nn.Module):
    """RMSNorm over all heads together, which are sharded over the tensor-parallel axis.

    Forward: one all-reduce of a sum of squares per token. Backward: one of its gradient.
    """

    def __init__(self, heads: int, width: int, eps: float, tp: Axis = SERIAL) -> None:
        """Builds this rank's shard of the weight, all ones.

        Args:
            heads: on all ranks.
            width: of a head.
            eps: added to the mean square.
            tp: axis over which the heads are sharded.
        """
        super().__init__()
        self.size = heads * width
        self.eps = eps
        self.tp = tp
        local = torch.ones(shard_size(heads, tp, "heads") * width)
        self.weight = set_tensor_parallel_attributes(nn.Parameter(local), (self.size,), 0)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's heads (..., heads/tp, width) -> the same shape."""
        y = x.flatten(-2)
        if self.tp.size == 1:
            return rms_norm(y, self.weight, self.eps).view_as(x)
        wide = y.float()
        squares = reduce_from_tensor_parallel(wide.square().sum(-1, keepdim=True), self.tp)
        # Each rank's gradient of the sum is that of its own heads.
        squares = copy_to_tensor_parallel(squares, self.tp)
        y = (wide * torch.rsqrt(squares / self.size + self.eps) * self.weight).to(x.dtype)
        return y.view_as(x)
