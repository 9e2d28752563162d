"""The greedy blend, computed in parallel with the result of one draw after the other.

Draw s goes to the source d with the largest `weight[d] * max(s, 1) - count[d]`, in float64, the
product rounded before the difference, the first of equals. A draw needs the counts before it, so
blocks of draws start from guessed counts and run side by side: most guesses become right after some
draws. A block is right if it started from the counts with which a right predecessor ended; the
others run again from those counts. The guesses affect only the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SourceArray = npt.NDArray[np.uint16]

MAX_SOURCES = 1 << 16
_BLOCKS = 1024  # run side by side
_BLOCK = 1024  # draws of a block
_SHORTEST = 32
_SETTLE = 256  # draws run before a block, so that its guess becomes right
_VALUES = 1 << 21  # counts kept at a time, blocks x sources


class Draws(NamedTuple):
    """Some draws: the source of each, and which of that source's own draws it is; both (draws,)."""

    sources: SourceArray
    numbers: IntArray


def greedy_blend(weights: FloatArray, size: int) -> Iterator[Draws]:
    """The first `size` draws from sources of `weights`, in blocks of bounded size.

    Args:
        weights: of each source, of sum about 1; not normalised here, for that would change them.
        size: draws.
    """
    assert 0 < len(weights) <= MAX_SOURCES and weights.dtype == np.float64
    counts = np.zeros(len(weights))
    done = 0
    while done < size:
        sources, after = _draw_chunk(weights, done, counts, size - done)
        yield Draws(sources, _number(sources, counts))
        done += len(sources)
        counts = after


def _draw_chunk(
    weights: FloatArray, start: int, counts: FloatArray, left: int
) -> tuple[SourceArray, FloatArray]:
    """At most `left` draws from draw `start`, and the counts after them (if not truncated)."""
    length = min(_BLOCK, max(_SHORTEST, isqrt(left)))
    blocks = min(_BLOCKS, max(1, _VALUES // len(weights)), -(-left // length))
    firsts = start + np.arange(blocks, dtype=np.float64) * length
    settle = min(_SETTLE, length)
    begins = _guess(weights, firsts - settle)
    _run(weights, begins, firsts - settle, settle)
    begins[0] = counts
    ends = begins.copy()
    picks = _run(weights, ends, firsts, length)
    # Each round makes at least the first wrong block right, so this ends.
    while len(wrong := 1 + np.flatnonzero((begins[1:] != ends[:-1]).any(axis=1))):
        again = begins[wrong] = ends[wrong - 1]
        picks[:, wrong] = _run(weights, again, firsts[wrong], length)
        ends[wrong] = again
    return picks.T.ravel()[:left], ends[-1]


def _guess(weights: FloatArray, draws: FloatArray) -> FloatArray:
    """Likely counts after each of `draws`, (draws, sources).

    Rare sources get too little rather than too much: an overdue draw is made at once, but one draw
    too many stays wrong until it falls due.
    """
    counts = np.floor(draws[:, None] * weights)
    missing = draws - counts.sum(axis=1)  # less than one per source
    for source in np.argsort(-weights, kind="stable"):
        more = np.clip(missing, -1, 1)
        counts[:, source] += more
        missing = missing - more
    return np.maximum(counts, 0.0)


def _run(
    weights: FloatArray, counts: FloatArray, firsts: FloatArray, length: int
) -> npt.NDArray[Any]:
    """Apply the rule `length` times to each block; `counts` (blocks, sources) is changed in place.

    Returns:
        The sources drawn, (length, blocks).
    """
    blocks, sources = counts.shape
    flat = counts.reshape(-1)  # a view
    row_starts = np.arange(blocks) * sources
    errors = np.empty_like(counts)
    picked = np.empty(blocks, dtype=np.intp)
    picks = np.empty((length, blocks), dtype=np.uint16)
    for step in range(length):
        factors = np.maximum(firsts + step, 1.0)
        np.multiply(factors[:, None], weights, out=errors)
        np.subtract(errors, counts, out=errors)
        errors.argmax(axis=1, out=picked)  # the first of equals
        picks[step] = picked
        picked += row_starts
        flat[picked] += 1.0
    return picks


def _number(sources: SourceArray, counts: FloatArray) -> IntArray:
    """Which of its source's own draws each is, with `counts` drawn before; (draws,)."""
    drawn = np.bincount(sources, minlength=len(counts))
    # Grouped by source and in order within it, a draw's number is its distance from the first.
    grouped = np.argsort(sources, kind="stable")
    shift = counts.astype(np.int64) - (np.cumsum(drawn) - drawn)
    numbers = np.empty(len(sources), dtype=np.int64)
    numbers[grouped] = np.arange(len(sources)) + np.repeat(shift, drawn)
    return numbers
