"""How the documents of a file are split into training, validation and test documents."""

from __future__ import annotations

from megatron.config.errors import DataError
from megatron.data.megatron_order.requests import plain_sum

Shares = tuple[float, float, float]
NAMES = ("train", "valid", "test")


def split_documents(shares: Shares, documents: int) -> tuple[range, range, range]:
    """Contiguous document numbers of each split.

    Each share is rounded by itself, half to even; what this gives too much or too little is taken
    from every boundary, so that the last is `documents` and the first split changes too.

    Raises:
        DataError: the shares are not usable, or rounding leaves a split less than nothing.
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
