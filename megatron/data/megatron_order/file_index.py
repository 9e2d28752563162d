"""The three arrays of a file in a split: documents in order, where samples begin, sample order.

One generator, seeded by the run's seed alone, is used in this order: documents, then samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.indexed import Int32Array, Int64Array
from megatron.data.megatron_order.epochs import Epochs

BLOCK = 1 << 20  # documents or samples worked on at a time
# Sample numbers are int64 from here on, else uint32.
_WIDE = 2**32 - 2


def document_index(documents: range, epochs: Epochs, rng: np.random.RandomState) -> Int32Array:
    """Documents in the order in which they are read, (passes * documents,)."""
    one = np.arange(documents.start, documents.stop, dtype=np.int32)
    joint = np.tile(one, epochs.passes - epochs.separate_last)
    rng.shuffle(joint)
    if not epochs.separate_last:
        return joint
    rng.shuffle(one)
    return np.concatenate([joint, one])


def sample_index(
    order: Int32Array, lengths: Int32Array, seq_length: int, samples: int, block: int = BLOCK
) -> Iterator[Int64Array]:
    """Where each sample begins: rows of (place in `order`, token within that document).

    Row k is the place of token k * S of the documents laid end to end in `order`; sample k goes to
    the token of row k + 1 inclusive. Row 0 is (0, 0), even where the first document is empty.

    Args:
        order: documents, from `document_index`.
        lengths: tokens of each document of the file.
        seq_length: S.
        samples: rows are one more.
        block: documents read, and rows made, at a time.

    Yields:
        Blocks of the rows, (rows, 2).
    """
    yield np.zeros((1, 2), dtype=np.int64)
    row, before = 1, 0  # the next row, and tokens before the block
    for first in range(0, len(order), block):
        sizes = lengths[order[first : first + block]].astype(np.int64)
        ends = before + np.cumsum(sizes)
        before = int(ends[-1])
        stop = min(samples, (before - 1) // seq_length) + 1
        while row < stop:
            tokens = np.arange(row, min(stop, row + block), dtype=np.int64) * seq_length
            # An empty document holds no token: take the first that ends beyond it.
            places = np.searchsorted(ends, tokens, side="right")
            offsets = tokens - (ends[places] - sizes[places])
            yield np.stack([first + places, offsets], axis=1)
            row += len(tokens)
    assert row == samples + 1, f"{row=} {samples=}"


def shuffle_index(epochs: Epochs, rng: np.random.RandomState) -> npt.NDArray[Any]:
    """Sample numbers in the order in which they are read, (samples,)."""
    numbers = np.arange(epochs.samples, dtype=shuffle_dtype(epochs.samples))
    rng.shuffle(numbers[: epochs.joint_samples])  # views: shuffled in place
    if epochs.joint_samples < epochs.samples:
        rng.shuffle(numbers[epochs.joint_samples :])
    return numbers


def shuffle_dtype(samples: int) -> np.dtype[Any]:
    """Type of sample numbers in a file of `samples` samples."""
    return np.dtype("<i8" if samples >= _WIDE else "<u4")
