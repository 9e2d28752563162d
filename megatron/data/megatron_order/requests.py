"""What a run requests of each split: its documents of a file, and samples of each file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megatron.config.errors import DataError

Shares = tuple[float, float, float]
NAMES = ("train", "valid", "test")
MARGIN = 1.005  # a little more than its share is requested of each file


class Wanted(NamedTuple):
    """Samples of each split, over all files; 0 for a split that is never read."""

    train: int
    valid: int
    test: int


def samples_wanted(
    train_iters: int,
    global_batch_size: int,
    eval_interval: int,
    eval_iters: int,
    train_samples: int | None = None,
) -> Wanted:
    """Samples of a run; without evaluation (`eval_interval` 0) only those of training."""
    train = train_samples or train_iters * global_batch_size
    if eval_interval == 0:
        return Wanted(train, 0, 0)
    evaluations = train_iters // eval_interval + 1
    batches = eval_iters * global_batch_size
    return Wanted(train, evaluations * batches, batches)


def file_requests(weights: Sequence[float], wanted: int) -> list[int]:
    """Samples requested of each file, in list order: (wanted * (weight / sum)) * 1.005, rounded up.

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


def split_documents(shares: Shares, documents: int) -> tuple[range, range, range]:
    """Contiguous document numbers of each split.

    Each share is rounded by itself, half to even. The excess is then subtracted from every
    boundary, so that the last is `documents`; the first split changes too.

    Raises:
        DataError: the shares are not usable, or rounding makes a split negative.
    """
    if min(shares) < 0 or not 0 < plain_sum(shares) < float("inf"):
        raise DataError(f"TRAIN_SPLIT,VAL_SPLIT,TEST_SPLIT = {split_text(shares)}: must not be "
                        "negative, and one must be above 0")  # fmt: skip
    total = plain_sum(shares)
    ends, end = [], 0
    for share in shares:
        end += round(share / total * float(documents))
        ends.append(end)
    surplus = end - documents
    first, second, third = (end - surplus for end in ends)
    if first < 0:
        raise DataError(
            f"TRAIN_SPLIT,VAL_SPLIT,TEST_SPLIT = {split_text(shares)} of {documents} documents "
            f"rounds to {first} documents for training; raise TRAIN_SPLIT"
        )
    return range(first), range(first, second), range(second, third)


def split_text(shares: Shares) -> str:
    """The shares as a user writes them: `990,10,0`."""
    return ",".join(
        str(int(share)) if float(share).is_integer() else str(share) for share in shares
    )
