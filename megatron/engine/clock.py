"""Moments of a device's stream, which do not wait for it, and the milliseconds between them."""

from __future__ import annotations

import time
from typing import Any

import torch


class HostEvent:
    """torch.Event for a host that computes itself."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds to a later event."""
        return 1000 * (end._time - self._time)

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def synchronize(self) -> None:
        """Waits until it has."""


def moment(device: torch.device) -> Any:
    """Now, on the stream of `device`."""
    if device.type == "cpu":
        return HostEvent()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event
