"""Gradients of which each tensor-parallel rank has a part: those of replicated weights that the
ranks apply to different vectors (positions or heads).

Such a parameter has `tp_partial_grad = True`. Whoever steps sums the parts once per step, before
norm and clip: ZeRO, clipping and the optimizer need identical gradients on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.parallel.groups import Axis


def is_partial(parameter: nn.Parameter) -> bool:
    """Whether this rank's gradient of it is a part of a sum over the tensor-parallel ranks."""
    return getattr(parameter, "tp_partial_grad", False)


def reduce_partial_gradients(parameters: Iterable[nn.Parameter], tp: Axis) -> None:
    """Sums `grad` of the marked ones among the parameters as `sum_parts` does."""
    marked = [parameter for parameter in parameters if is_partial(parameter)]
    sum_parts([parameter.grad for parameter in marked if parameter.grad is not None], tp)


@torch.no_grad()
def sum_parts(parts: Sequence[Tensor], tp: Axis) -> None:
    """Replaces each tensor by its sum over the ranks: one all-reduce of all, in fp32 or wider.

    Args:
        parts: of any shapes, the same shapes in the same order on all ranks; written in place.
        tp: tensor-parallel axis.
    """
    if tp.size == 1 or not parts:
        return
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    flat = torch.cat([part.reshape(-1).to(wide) for part in parts])
    dist.all_reduce(flat, group=tp.group)
    sizes = [part.numel() for part in parts]
    for part, total in zip(parts, torch.split(flat, sizes), strict=True):
        part.copy_(total.view_as(part))
