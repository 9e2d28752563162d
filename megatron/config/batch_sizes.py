"""Samples per step: GLOBAL_BATCH, or growing to it (RAMPUP_BATCH_SIZE).

The batch of step i follows from its number, so steps, samples and tokens of a run are functions of
one another: `consumed` and `steps` convert them exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron.config.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """The ramp as Megatron has it: one size for each of `phases` equal parts of `samples`.

    Attributes:
        full: GLOBAL_BATCH.
        start, increment: sizes of the ramp.
        samples: of the ramp; 0: there is none.
    """

    full: int
    start: int = 0
    increment: int = 1
    samples: int = 0

    @property
    def phases(self) -> int:
        """Sizes below the full one."""
        return (self.full - self.start) // self.increment

    def at(self, consumed: int) -> int:
        """Samples of the step before which so many are consumed."""
        if consumed >= self.samples:
            return self.full
        return self.start + consumed * self.phases // self.samples * self.increment

    def of(self, step: int) -> int:
        """Samples of step `step` (1-based)."""
        return self.consumed(step) - self.consumed(step - 1) if self.samples else self.full

    def consumed(self, steps: int) -> int:
        """Samples of a run's first `steps` steps."""
        first, before, size = [one for one in _stretches(self) if one[0] <= steps][-1]
        return before + (steps - first) * size

    def steps(self, samples: int) -> int:
        """Whole steps in a run's first `samples` samples."""
        first, before, size = [one for one in _stretches(self) if one[1] <= samples][-1]
        return first + (samples - before) // size

    def stretches(self) -> tuple[tuple[int, int, int], ...]:
        """(steps, samples) before each run of steps of one size, and the size."""
        return _stretches(self)

    def __str__(self) -> str:
        """`START INCREMENT SAMPLES`, as a user writes it."""
        return f"{self.start} {self.increment} {self.samples}"


@functools.cache
def _stretches(sizes: BatchSizes) -> tuple[tuple[int, int, int], ...]:
    """(steps, samples) before each run of steps of one size, and the size."""
    found, steps, consumed = [], 0, 0
    while consumed < sizes.samples:
        size = sizes.at(consumed)
        found.append((steps, consumed, size))
        phase = consumed * sizes.phases // sizes.samples
        border = -(-(phase + 1) * sizes.samples // sizes.phases)  # first sample of the next phase
        count = -(-(border - consumed) // size)
        steps, consumed = steps + count, consumed + count * size
    return (*found, (steps, consumed, sizes.full))


def parse(text: str | None, full: int, name: str = "RAMPUP_BATCH_SIZE") -> BatchSizes:
    """The sizes that `START INCREMENT SAMPLES` gives; constant without a text.

    Raises:
        ConfigError: not three numbers, or a ramp that does not lead to `full` (GLOBAL_BATCH).
    """
    if not text:
        return BatchSizes(full)
    try:
        start, increment, samples = (int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(
            f"{name}={text}: needs three whole numbers, START INCREMENT SAMPLES, e.g. "
            f"`{max(1, full // 4)} {max(1, full // 4)} {100 * full}`"
        ) from None
    rest = (full - start) % increment if increment > 0 else 0
    if min(start, increment, samples) < 1 or start >= full:
        raise ConfigError(
            f"{name}={text}: START, INCREMENT and SAMPLES must be at least 1, and START {start} "
            f"below GLOBAL_BATCH={full}"
        )
    if rest:
        raise ConfigError(
            f"{name}={text}: START {start} does not reach GLOBAL_BATCH={full} in steps of "
            f"{increment}: ({full} - {start}) / {increment} leaves {rest}. Set START to "
            f"{start + rest}, or GLOBAL_BATCH to {full - rest}"
        )
    return BatchSizes(full, start, increment, samples)
