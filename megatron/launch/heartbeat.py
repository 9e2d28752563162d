"""A rank's heartbeat: its step and phase, sent to the launcher that watches for hangs."""

from __future__ import annotations


class Heartbeat:
    """Tells the launcher where this rank is; without a launcher that listens it does nothing."""

    def enter(self, phase: str, step: int | None = None) -> None:
        """The rank begins something that can hang: start, load, data, step, evaluate, save."""

    def tick(self) -> None:
        """The phase has made progress: a micro-batch, a batch of an evaluation, a file."""

    def close(self) -> None:
        """The rank ends as it should: silence from here on is no hang."""
