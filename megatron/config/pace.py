"""What step i uses beside its samples: learning rate and weight decay, from a run's configuration.

Both count their progress in steps; where the batch grows, in samples, as a step of few samples is
a smaller part of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from megatron.config.schedule import learning_rate
from megatron.config.schema import RunConfig

FINDER_RISE = 1e6
"""LR_FINDER=1 without MIN_LR starts at LR / this."""


def learning_rates(run: RunConfig) -> Callable[[int], float]:
    """The rate of step i (1-based)."""
    optimizer, sizes = run.optimizer, run.batch_sizes
    if optimizer.lr_finder:
        return partial(finder_rate, run)
    if not sizes.samples:
        return partial(learning_rate, optimizer=optimizer)
    end = optimizer.lr_decay_iters
    scale = end / sizes.consumed(end)
    return lambda step: learning_rate(sizes.consumed(step) * scale, optimizer)


def finder_rate(run: RunConfig, step: int) -> float:
    """Rises by the same factor at every step: MIN_LR at the first, LR at the last."""
    highest, steps = run.optimizer.learning_rate, run.train.train_iters
    lowest = run.optimizer.min_learning_rate or highest / FINDER_RISE
    share = (step - 1) / max(1, steps - 1)
    return float(lowest * (highest / lowest) ** share)


def weight_decay(run: RunConfig, step: int) -> float:
    """Of step i (1-based): START_WEIGHT_DECAY at the first, END_WEIGHT_DECAY at the last."""
    optimizer, sizes = run.optimizer, run.batch_sizes
    shape = DECAY_SHAPES.get(optimizer.weight_decay_incr_style)
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if shape is None or start is None or end is None:
        return optimizer.weight_decay
    whole = max(1, sizes.consumed(run.train.train_iters - 1))
    return start + (end - start) * shape(min(1.0, sizes.consumed(step - 1) / whole))


DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: 0.5 * (1 - math.cos(math.pi * share)),
}
"""WEIGHT_DECAY_INCR_STYLE -> share of the way from start to end, by share of the run."""
