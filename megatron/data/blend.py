"""Stateless blending of weighted sources: draw m -> (source, draw of that source), for any m.

Draw k of source f is due at time (k + u_f) / w_f; draws are taken in order of due time, ties by
position. The phases u_f spread by the golden ratio keep every prefix and every batch close to its
quota. Nothing is stored: the time at which m draws are due is bisected, then one chunk is sorted.
A source with a limit has no draws beyond it, so the others share its place in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

GOLDEN_RATIO = 0.6180339887498949
CHUNK = 4096  # draws sorted at a time; the order does not depend on it
_ENDLESS = 1 << 62


class Blend:
    """An interleaving of sources in proportion to their weights, endless but for limits.

    Attributes:
        total: number of draws; None where some source has no limit.
    """

    def __init__(
        self,
        weights: Sequence[float],
        chunk: int = CHUNK,
        limits: Sequence[int | None] | None = None,
    ) -> None:
        """Blend sources in list order.

        Args:
            weights: positive; normalised here.
            chunk: draws sorted at a time.
            limits: most draws of each source; None for no limit.
        """
        assert len(weights) > 0 and all(0 < w < float("inf") for w in weights), weights
        given = [None] * len(weights) if limits is None else list(limits)
        assert len(given) == len(weights) and all(n is None or n >= 0 for n in given), given
        self.total = None if None in given else sum(n for n in given if n is not None)
        self._limits: IntArray = np.array([_ENDLESS if n is None else n for n in given], np.int64)
        weight = np.asarray(weights, dtype=np.float64)
        positions = np.arange(1, len(weights) + 1, dtype=np.float64)
        self.weights: FloatArray = weight / weight.sum()
        self._phases: FloatArray = positions * GOLDEN_RATIO % 1.0
        self._chunk = chunk
        self._cached: tuple[int, IntArray, IntArray] | None = None

    def draw(self, m: int) -> tuple[int, int]:
        """Source of draw `m` >= 0 and which of that source's own draws it is."""
        assert m >= 0 and (self.total is None or m < self.total), f"{m} of {self.total} draws"
        number, offset = divmod(m, self._chunk)
        cached = self._cached  # read once: another thread may replace it
        if cached is None or cached[0] != number:
            first = number * self._chunk
            stop = first + self._chunk if self.total is None else self.total
            cached = (number, *self.draws(first, min(first + self._chunk, stop)))
            self._cached = cached
        return int(cached[1][offset]), int(cached[2][offset])

    def draws(self, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Sources and their own draw numbers of draws [start, stop), each (stop - start,)."""
        assert self.total is None or stop <= self.total, f"{stop} of {self.total} draws"
        below, above = self._bracket(start)[0], self._bracket(stop)[1]
        per_source = above - below
        sources = np.repeat(np.arange(len(per_source)), per_source)
        first_of_source = np.cumsum(per_source) - per_source
        own = np.arange(len(sources)) - first_of_source[sources] + below[sources]
        due = self._due(own, sources)
        order = np.lexsort((sources, due))  # by due time, then position, then own number (stable)
        skipped = start - int(below.sum())
        order = order[skipped : skipped + stop - start]
        return sources[order], own[order]

    def position(self, source: int, own: int) -> int:
        """Which draw is draw `own` of `source`: the inverse of `draw`."""
        assert 0 <= own < self._limits[source]
        due = float(self._due(np.array([own]), np.array([source]))[0])
        first = int(self._due_until(np.nextafter(due, -np.inf)).sum())
        last = int(self._due_until(due).sum())  # draws due at one time are distinguished below
        sources, numbers = self.draws(first, last)
        return first + int(np.flatnonzero((sources == source) & (numbers == own))[0])

    def counts(self, m: int) -> IntArray:
        """How many of the first `m` draws each source gave, shape (sources,)."""
        below = self._bracket(m)[0]
        missing = m - int(below.sum())
        if missing:
            sources, _ = self.draws(m - missing, m)
            below = below + np.bincount(sources, minlength=len(below))
        return below

    def _due(self, own: IntArray, sources: IntArray | slice) -> FloatArray:
        """Due times; the one expression that decides both membership of a chunk and order in it."""
        due: FloatArray = (own + self._phases[sources]) / self.weights[sources]
        return due

    def _due_until(self, time: float) -> IntArray:
        """Draws of each source that are due at `time` or before, shape (sources,)."""
        everyone = slice(None)
        guess = np.floor(time * self.weights - self._phases) + 1
        counts: IntArray = np.clip(guess, 0, self._limits).astype(np.int64)
        # The guess is rounded differently from `_due`: move it until `_due` itself agrees.
        while (more := (self._due(counts, everyone) <= time) & (counts < self._limits)).any():
            counts = counts + more
        while (less := (counts > 0) & (self._due(counts - 1, everyone) > time)).any():
            counts = counts - less
        return counts

    def _bracket(self, m: int) -> tuple[IntArray, IntArray]:
        """Counts at the last time with at most `m` draws due, and at the first with at least `m`.

        They are equal unless several draws fall due at one time around `m`.
        """
        # A source is never further than one draw from its share, so `m` draws are due near time m,
        # or later where a limit has been reached.
        low, high = float(m - len(self.weights) - 1), float(m + len(self.weights) + 1)
        below, above = self._due_until(low), self._due_until(high)
        while int(above.sum()) < m:
            low, below, high = high, above, 2 * high
            above = self._due_until(high)
        while low < (middle := low + (high - low) / 2) < high:
            counts = self._due_until(middle)
            total = int(counts.sum())
            if total == m:
                return counts, counts
            if total < m:
                low, below = middle, counts
            else:
                high, above = middle, counts
        return below, above
