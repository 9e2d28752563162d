"""Which sample comes when: files within a corpus, then corpora."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.data.megatron_order.greedy import FloatArray, greedy_blend

BLOCK = 1 << 20


class Picks(NamedTuple):
    """Some samples: the source of each, and the sample's number within it; both (samples,)."""

    sources: npt.NDArray[Any]
    numbers: npt.NDArray[Any]


def corpus_weights(sizes: Sequence[int], train_total: int) -> FloatArray:
    """Normalised weights of the corpora, in their order.

    Args:
        sizes: samples of each corpus in the split.
        train_total: samples requested of all files for training, in every split.
    """
    weights = np.array([size / train_total for size in sizes], dtype=np.float64)
    # numpy's pairwise sum: another order of adding changes the blend of 8 corpora or more.
    normalised: FloatArray = weights / np.sum(weights)
    return normalised


def blend(weights: FloatArray, size: int, available: Sequence[int]) -> Iterator[Picks]:
    """The greedy blend of sources that have samples.

    A source without samples is skipped where a tie would make the greedy rule pick it.

    Args:
        weights: of each source; an empty source does not change the others' weights.
        size: samples.
        available: samples of each source.

    Raises:
        DataError: rounding makes the rule draw more from a source than it has.
    """
    limits = np.asarray(available, dtype=np.int64)
    used = np.flatnonzero(limits > 0)
    for draws in greedy_blend(weights[used], size):
        sources = used[draws.sources]
        beyond = np.flatnonzero(draws.numbers >= limits[sources])
        if len(beyond):
            source = int(sources[beyond[0]])
            raise DataError(
                f"DATA_ORDER=megatron needs, by rounding, more than the {available[source]} "
                f"samples of source {source} of a blend; change TRAIN_ITERS by one, or use "
                "DATA_ORDER=stateless"
            )
        yield Picks(sources, draws.numbers)


def corpus_order(
    requests: Sequence[int], available: Sequence[int], blended: bool, shuffled: bool, seed: int
) -> Iterator[Picks]:
    """The samples of a corpus: of which file, and their number within it.

    Args:
        requests: samples requested of each file.
        available: samples that each has.
        blended: files are blended by their requests; else one comes after the other.
        shuffled: the result is shuffled, in every corpus by the same seed.
        seed: the run's.
    """
    size = sum(requests)
    if shuffled:
        order = np.arange(size, dtype=number_dtype(size))
        np.random.RandomState(seed).shuffle(order)
        blocks = (order[first : first + BLOCK] for first in range(0, size, BLOCK))
    else:
        blocks = (np.arange(first, min(size, first + BLOCK)) for first in range(0, size, BLOCK))
    if not blended:
        ends = np.cumsum(requests)
        starts = ends - requests
        for block in blocks:
            files = np.searchsorted(ends, block, side="right")
            yield Picks(files, block - starts[files])
        return
    shares = np.array(requests) / size  # not normalised again
    unshuffled = Picks(
        np.empty(size, dtype=source_dtype(len(requests))), np.empty(size, dtype=number_dtype(size))
    )
    done = 0
    for picks in blend(shares, size, available):
        stop = done + len(picks.sources)
        unshuffled.sources[done:stop] = picks.sources
        unshuffled.numbers[done:stop] = picks.numbers
        done = stop
    for block in blocks:
        yield Picks(unshuffled.sources[block], unshuffled.numbers[block])


def source_dtype(sources: int) -> np.dtype[Any]:
    """Smallest type for the numbers of sources."""
    return np.dtype("<u1" if sources <= 1 << 8 else "<u2")


def number_dtype(size: int) -> np.dtype[Any]:
    """Smallest type for the numbers of samples."""
    return np.dtype("<u4" if size <= 1 << 32 else "<i8")
