"""The learning rate of step i: one pure function of (i, Schedule), one table row a decay style.

Steps are 1-based; the rate of step i is the one printed at i and used at i. Warm-up is linear and
starts at max_lr / warm-up steps (a fraction of a step counts), so no step is spent at a rate of 0.
Every style but `constant` is at min_lr from the last decay step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.config.schema import OptimizerConfig


@dataclass(frozen=True)
class Schedule:
    """Everything the learning rate depends on; validate.py holds the numbers against one another.

    Attributes:
        style: a key of STYLES.
        max_lr: rate at the end of warm-up.
        min_lr: rate after the decay.
        decay_iters: steps from the first to the end of the decay.
        warmup_fraction: share of `decay_iters` spent warming up.
        cooldown_fraction: infinite-*: share of `decay_iters` from max_lr to constant_lr.
        constant_lr: infinite-*: rate of the plateau.
        constant_fraction: infinite-*: share of `decay_iters` on the plateau.
        timescale: infinite-inv-square-root: how steep the fall to constant_lr starts.
        decay_fraction: warmup-stable-decay: share of `decay_iters` spent decaying, at the end.
    """

    style: str
    max_lr: float
    min_lr: float
    decay_iters: int
    warmup_fraction: float = 0.0
    cooldown_fraction: float = 0.0
    constant_lr: float = 0.0
    constant_fraction: float = 0.0
    timescale: float = 10.0
    decay_fraction: float = 0.1

    @property
    def warmup(self) -> float:
        """Steps of warm-up, not rounded."""
        return self.warmup_fraction * self.decay_iters


def schedule(optimizer: OptimizerConfig, train_iters: int) -> Schedule:
    """The schedule of a run.

    Args:
        optimizer: the `optimizer` section of the configuration.
        train_iters: steps of the run; the decay ends there unless LR_DECAY_ITERS is set.
    """
    return Schedule(
        style=optimizer.lr_decay_style,
        max_lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        decay_iters=train_iters if optimizer.lr_decay_iters is None else optimizer.lr_decay_iters,
        warmup_fraction=optimizer.lr_warmup_fraction,
        cooldown_fraction=optimizer.lr_cooldown_fraction,
        constant_lr=optimizer.lr_constant,
        constant_fraction=optimizer.lr_constant_fraction,
        timescale=optimizer.lr_timescale,
        decay_fraction=optimizer.lr_decay_fraction,
    )


def learning_rate(iteration: int, schedule: Schedule) -> float:
    """The rate of step `iteration` (1-based)."""
    assert iteration >= 1, f"steps are counted from 1, got {iteration}"
    if iteration <= schedule.warmup:
        return schedule.max_lr * iteration / schedule.warmup
    if schedule.style != "constant" and iteration >= schedule.decay_iters:
        return schedule.min_lr
    return STYLES[schedule.style](iteration, schedule)


def _constant(iteration: int, s: Schedule) -> float:
    return s.max_lr


def _linear(iteration: int, s: Schedule) -> float:
    return s.max_lr + (s.min_lr - s.max_lr) * _share(iteration, s.warmup, s.decay_iters)


def _cosine(iteration: int, s: Schedule) -> float:
    return _half_cosine(s.max_lr, s.min_lr, _share(iteration, s.warmup, s.decay_iters))


def _inverse_square_root(iteration: int, s: Schedule) -> float:
    return max(s.min_lr, s.max_lr * math.sqrt(max(s.warmup, 1.0) / iteration))


def _infinite_cosine(iteration: int, s: Schedule) -> float:
    return _infinite(iteration, s, lambda share: _half_cosine(s.max_lr, s.constant_lr, share))


def _infinite_inverse_square_root(iteration: int, s: Schedule) -> float:
    def fall(share: float) -> float:
        """max_lr at 0, constant_lr at 1, 1 / sqrt(1 + timescale * share) between."""
        floor = 1 / math.sqrt(1 + s.timescale)
        height = (1 / math.sqrt(1 + s.timescale * share) - floor) / (1 - floor)
        return s.constant_lr + (s.max_lr - s.constant_lr) * height

    return _infinite(iteration, s, fall)


def _infinite(iteration: int, s: Schedule, fall: Callable[[float], float]) -> float:
    """Fall to constant_lr, stay there, then anneal to min_lr (arXiv:2403.08763).

    The anneal is geometric. A geometric fall never reaches 0, so that min_lr = 0 is annealed to in
    a straight line.
    """
    cooled = s.warmup + s.cooldown_fraction * s.decay_iters
    anneal = cooled + s.constant_fraction * s.decay_iters
    if iteration <= cooled:
        return fall(_share(iteration, s.warmup, cooled))
    if iteration <= anneal:
        return s.constant_lr
    share = _share(iteration, anneal, s.decay_iters)
    if s.min_lr == 0:
        return s.constant_lr * (1 - share)
    return float(s.constant_lr * (s.min_lr / s.constant_lr) ** share)


def _warmup_stable_decay(iteration: int, s: Schedule) -> float:
    """max_lr, then a fall by 1 - sqrt, the best shape of arXiv:2405.18392."""
    start = s.decay_iters * (1 - s.decay_fraction)
    if iteration <= start:
        return s.max_lr
    return s.min_lr + (s.max_lr - s.min_lr) * (
        1 - math.sqrt(_share(iteration, start, s.decay_iters))
    )


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def _share(iteration: int, start: float, end: float) -> float:
    """How much of the phase (start, end] is done at `iteration`, which lies in it: in (0, 1]."""
    return (iteration - start) / (end - start)


STYLES: dict[str, Callable[[int, Schedule], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse-square-root": _inverse_square_root,
    "infinite-cosine": _infinite_cosine,
    "infinite-inv-square-root": _infinite_inverse_square_root,
    "warmup-stable-decay": _warmup_stable_decay,
}
