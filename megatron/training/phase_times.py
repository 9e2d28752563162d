"""A step's phases, the fastest rank's time and the slowest one's: TIMING_LOG_LEVEL=1."""

from __future__ import annotations

import logging
from typing import Any

from megatron.engine.phases import PHASES, Phases
from megatron.parallel.control import Control
from megatron.training.log import TRAINING_LOG
from megatron.training.metrics_file import MetricsRecord

WIDTH = 48  # of a name with its dots, as the reference prints it
NANOSECONDS = 10**9


def across_ranks(phases: Phases, control: Control) -> dict[str, Any]:
    """`timers_min` and `timers_max`, phase -> seconds per step; a collective of all ranks.

    Returns:
        Nothing where no step was taken since the last call.
    """
    own = phases.seconds()
    whole = [round(own.get(name, 0.0) * NANOSECONDS) for name in PHASES]
    extremes = control.maximum([*(-time for time in whole), *whole])
    if not own:  # alike on all ranks
        return {}
    least, most = extremes[: len(PHASES)], extremes[len(PHASES) :]
    shown = [(name, -low, high) for name, low, high in zip(PHASES, least, most, strict=True)]
    return {
        "timers_min": {name: low / NANOSECONDS for name, low, high in shown if high},
        "timers_max": {name: high / NANOSECONDS for name, low, high in shown if high},
    }


class PhaseTimes:
    """Prints the block behind a step's line."""

    def __init__(self) -> None:
        self._log = logging.getLogger(TRAINING_LOG)

    def log(self, record: MetricsRecord) -> None:
        """Prints one line per phase, if the record has them."""
        lines = ["(min, max) time across ranks (ms):"]
        for name, most in record.get("timers_max", {}).items():
            least = record["timers_min"][name]
            lines.append(f"  {name + ' ':.<{WIDTH}}: ({1000 * least:.2f}, {1000 * most:.2f})")
        if len(lines) > 1:
            self._log.info("\n".join(lines))

    def close(self) -> None:
        """Nothing is pending."""
