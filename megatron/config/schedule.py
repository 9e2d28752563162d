"""The learning rate of step i, a pure function of the configuration; one table row per style.

Steps are 1-based; the rate of step i is the one printed at i and used at i. Warm-up is linear and
starts at LR / warm-up steps (a fraction of a step counts), so no step is spent at a rate of 0.
Every style but `constant` is at MIN_LR from the last decay step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.config.schema import OptimizerConfig


def learning_rate(iteration: float, optimizer: OptimizerConfig) -> float:
    """The rate of step `iteration` (1-based).

    Args:
        iteration: not whole where the batch grows and progress is counted in samples.
        optimizer: of a resolved configuration; validate.py compares its numbers with one another.
    """
    assert iteration > 0, f"steps are counted from 1, got {iteration}"
    warmup, style = _warmup(optimizer), optimizer.lr_decay_style
    if iteration <= warmup:
        return optimizer.learning_rate * iteration / warmup
    if style != "constant" and iteration >= optimizer.lr_decay_iters:
        return optimizer.min_learning_rate
    return STYLES[style](iteration, optimizer)


def _warmup(optimizer: OptimizerConfig) -> float:
    """Steps of warm-up, not rounded."""
    return optimizer.lr_warmup_fraction * optimizer.lr_decay_iters


def _constant(iteration: float, o: OptimizerConfig) -> float:
    return o.learning_rate


def _linear(iteration: float, o: OptimizerConfig) -> float:
    return o.learning_rate + (o.min_learning_rate - o.learning_rate) * _decayed(iteration, o)


def _cosine(iteration: float, o: OptimizerConfig) -> float:
    return _half_cosine(o.learning_rate, o.min_learning_rate, _decayed(iteration, o))


def _inverse_square_root(iteration: float, o: OptimizerConfig) -> float:
    return max(o.min_learning_rate, o.learning_rate * math.sqrt(max(_warmup(o), 1.0) / iteration))


def _infinite_cosine(iteration: float, o: OptimizerConfig) -> float:
    def fall(share: float) -> float:
        return _half_cosine(o.learning_rate, o.lr_constant, share)

    return _infinite(iteration, o, fall)


def _infinite_inverse_square_root(iteration: float, o: OptimizerConfig) -> float:
    def fall(share: float) -> float:
        """LR at 0, LR_CONSTANT at 1, 1 / sqrt(1 + timescale * share) between."""
        floor = 1 / math.sqrt(1 + o.lr_timescale)
        height = (1 / math.sqrt(1 + o.lr_timescale * share) - floor) / (1 - floor)
        return o.lr_constant + (o.learning_rate - o.lr_constant) * height

    return _infinite(iteration, o, fall)


def _infinite(iteration: float, o: OptimizerConfig, fall: Callable[[float], float]) -> float:
    """Fall to LR_CONSTANT, stay there, then anneal to MIN_LR (arXiv:2403.08763).

    The anneal is geometric. A geometric fall never reaches 0, so MIN_LR = 0 is annealed to
    linearly.
    """
    cooled = _warmup(o) + o.lr_cooldown_fraction * o.lr_decay_iters
    anneal = cooled + o.lr_constant_fraction * o.lr_decay_iters
    if iteration <= cooled:
        return fall(_share(iteration, _warmup(o), cooled))
    if iteration <= anneal:
        return o.lr_constant
    share = _share(iteration, anneal, o.lr_decay_iters)
    if o.min_learning_rate == 0:
        return o.lr_constant * (1 - share)
    return float(o.lr_constant * (o.min_learning_rate / o.lr_constant) ** share)


def _warmup_stable_decay(iteration: float, o: OptimizerConfig) -> float:
    """LR, then a fall by 1 - sqrt, the best shape of arXiv:2405.18392."""
    start = o.lr_decay_iters * (1 - o.lr_decay_fraction)
    if iteration <= start:
        return o.learning_rate
    return o.min_learning_rate + (o.learning_rate - o.min_learning_rate) * (
        1 - math.sqrt(_share(iteration, start, o.lr_decay_iters))
    )


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def _decayed(iteration: float, o: OptimizerConfig) -> float:
    """How much of the decay is done at `iteration`."""
    return _share(iteration, _warmup(o), o.lr_decay_iters)


def _share(iteration: float, start: float, end: float) -> float:
    """How much of the phase (start, end] is done at `iteration`, which lies in it: in (0, 1]."""
    return (iteration - start) / (end - start)


STYLES: dict[str, Callable[[float, OptimizerConfig], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse-square-root": _inverse_square_root,
    "infinite-cosine": _infinite_cosine,
    "infinite-inv-square-root": _infinite_inverse_square_root,
    "warmup-stable-decay": _warmup_stable_decay,
}
