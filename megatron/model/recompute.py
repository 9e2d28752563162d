"""Activation checkpointing: keep a function's inputs only, run it again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RECOMPUTE = ("none", "selective", "full")


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), whose intermediate tensors are computed again for the backward pass.

    The second run stops as soon as the last tensor the backward needs is there. So a matrix product
    at the end of `function`, and the all-reduce after it, are not done twice: only their input is.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    # Nothing here is random, so there is no generator state to keep.
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
