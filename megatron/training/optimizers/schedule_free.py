"""Schedule-free rules train at one point and evaluate at another: the switch and back.

The optimizer's weights are y, where gradients are taken; the model is x, the running average.
With the state z and the first beta, x = y + (1 - 1/beta1) (z - y).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@contextmanager
def evaluation_weights(optimizer: Optimizer, refresh: Callable[[], None]) -> Iterator[None]:
    """Puts the averaged weights into the model, and the exact training weights back.

    Does nothing for other rules. Costs one more copy of this rank's fp32 weights.

    Args:
        optimizer: with DeepSpeed's flat partitions in it (ZeRO-1 or 2).
        refresh: rebuilds the model's weights from the fp32 partitions, on all ranks.
    """
    rule: Any = optimizer  # only schedule-free ones have the two modes
    if "train_mode" not in optimizer.param_groups[0]:
        yield
        return
    flats = [flat for group in optimizer.param_groups for flat in group["params"]]
    assert flats, "ZeRO-3 keeps its partitions out of the groups"
    # The inverse formula would round, so that an evaluation would change the training.
    kept = [flat.detach().clone() for flat in flats]
    rule.eval()
    refresh()
    try:
        yield
    finally:
        with torch.no_grad():
            for flat, values in zip(flats, kept, strict=True):
                flat.copy_(values)
        for group in optimizer.param_groups:
            group["train_mode"] = True
        refresh()


def evaluation_weight(weight: Tensor, z: Tensor, beta1: float) -> Tensor:
    """The model's weight from a checkpoint's weight and state `z`; any shape, fp32.

    Args:
        weight: y.
        z: of the same shape.
        beta1: ADAM_BETA1 of the run.
    """
    return torch.lerp(weight, z, 1 - 1 / beta1)
