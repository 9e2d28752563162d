"""Spikes: how far a step's loss and gradient norm lie above those of the steps before it.

The distance is a robust z-score: (value - median) / deviation, with the deviation estimated from
the median absolute deviation. Pure arithmetic; what follows from a spike is in guard.py.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
FLOOR_LOSS = 0.01  # smallest deviation, as a fraction of the median loss
FLOOR_NORM = 0.1  # the same of the logarithm of a gradient norm: about a tenth of the norm
FEWEST_STEPS = 16
"""Chosen by simulated curves (tests/training/test_stability.py): without the floors rounding in a
flat window is a spike; a norm is compared by its logarithm since its noise is a factor."""


@dataclass(frozen=True)
class Score:
    """A value beside its window.

    Attributes:
        value: of the step.
        median: of the window; None while the window has too few steps.
        z: deviations above the median, infinite for a value that is not finite; None as above.
    """

    value: float
    median: float | None
    z: float | None


@dataclass(frozen=True)
class Judgement:
    """What the window says about one step.

    Attributes:
        loss, grad_norm: their scores.
        steps: in the window.
        is_spike: a value is not finite, or too far above its median; below it nothing is.
    """

    loss: Score
    grad_norm: Score
    steps: int
    is_spike: bool

    @property
    def finite(self) -> bool:
        """Whether both values are."""
        return math.isfinite(self.loss.value) and math.isfinite(self.grad_norm.value)


class SpikeDetector:
    """The last steps that were neither spikes nor without a finite value.

    It scores a step once it has half a window, at least 16 steps. As many spikes in a row as that
    are a new level: the window then starts again.

    Args:
        window: steps to compare with.
        threshold: z above which a value is a spike.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self._threshold = threshold
        self._needed = max(FEWEST_STEPS, window // 2)
        self._steps: deque[tuple[float, float]] = deque(maxlen=max(window, FEWEST_STEPS))
        self._spikes_in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> Judgement:
        """Scores a step; changes nothing."""
        enough = len(self._steps) >= self._needed
        losses, norms = zip(*self._steps, strict=True) if enough else ((), ())
        scores = _score(loss, losses), _score_of_norm(grad_norm, norms)
        is_spike = any(score.z is not None and score.z > self._threshold for score in scores)
        return Judgement(*scores, len(self._steps), is_spike)

    def add(self, judgement: Judgement) -> None:
        """Takes a judged step into the window unless it is a spike."""
        if not judgement.is_spike:
            self._steps.append((judgement.loss.value, judgement.grad_norm.value))
            self._spikes_in_a_row = 0
        elif judgement.finite:
            self._spikes_in_a_row += 1
            if self._spikes_in_a_row >= self._needed:
                self._steps.clear()
                self._spikes_in_a_row = 0


def _score(value: float, window: tuple[float, ...]) -> Score:
    if not window:
        return Score(value, None, None if math.isfinite(value) else math.inf)
    middle = median(window)
    return Score(value, middle, _z(value, window, middle, FLOOR_LOSS * abs(middle)))


def _score_of_norm(norm: float, window: tuple[float, ...]) -> Score:
    """The score of a norm by its logarithm; the median is the norm's own."""
    if not window:
        return _score(norm, window)
    logarithms = tuple(map(_log, window))
    middle = median(logarithms)
    return Score(norm, math.exp(middle), _z(_log(norm), logarithms, middle, FLOOR_NORM))


def _z(value: float, window: tuple[float, ...], middle: float, floor: float) -> float:
    if not math.isfinite(value):
        return math.inf
    deviation = MAD_TO_DEVIATION * median(abs(other - middle) for other in window)
    return (value - middle) / max(deviation, floor, 1e-30)  # a window of zeros has neither


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30)) if math.isfinite(norm) else math.inf
