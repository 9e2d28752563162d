"""How many samples a run asks of each split and of each file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megatron.config.errors import DataError

MARGIN = 1.005  # files are asked for a little more than their share


class Wanted(NamedTuple):
    """Samples of each split, over all files; 0 for a split that is never read."""

    train: int
    valid: int
    test: int


def samples_wanted(
    train_iters: int, global_batch_size: int, eval_interval: int, eval_iters: int
) -> Wanted:
    """Samples of a run; without evaluation (`eval_interval` 0) only those of training."""
    train = train_iters * global_batch_size
    if eval_interval == 0:
        return Wanted(train, 0, 0)
    evaluations = train_iters // eval_interval + 1
    batches = eval_iters * global_batch_size
    return Wanted(train, evaluations * batches, batches)


def file_requests(weights: Sequence[float], wanted: int) -> list[int]:
    """Samples asked of each file, in list order: (wanted * (weight / sum)) * 1.005, rounded up.

    Raises:
        DataError: a weight is negative or not finite, or all are 0.
    """
    bad = [weight for weight in weights if not 0 <= weight < float("inf")]
    total = plain_sum(weights)
    if bad or not 0 < total < float("inf"):
        raise DataError(
            f"DATA_FILE_LIST: weights must be 0 or more and finite, and one above 0 (found "
            f"{bad[0] if bad else total})"
        )
    return [math.ceil(wanted * (weight / total) * MARGIN) for weight in weights]


def plain_sum(values: Iterable[float]) -> float:
    """Sum from left to right, each step rounded: Python 3.12's own sum carries the rounding."""
    total = 0.0
    for value in values:
        total += value
    return total
