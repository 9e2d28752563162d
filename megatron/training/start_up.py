"""Seconds of a start by what it did, from the process' beginning to the first step."""

from __future__ import annotations

import importlib
import logging
import time

log = logging.getLogger(__name__)


class StartUp:
    """Takes the time of one thing after the other; the first are the imports."""

    def __init__(self) -> None:
        psutil = importlib.import_module("psutil")  # which DeepSpeed requires
        self._began = self._last = psutil.Process().create_time()
        self._parts: list[str] = []
        self.took("imports")

    def took(self, name: str) -> None:
        """What was done since the last call was `name`; what took no time is not told."""
        now = time.time()
        if now - self._last >= 0.05:
            self._parts.append(f"{name} {now - self._last:.1f}")
        self._last = now

    def log(self) -> None:
        """One line."""
        log.info(f"start-up time: {self._last - self._began:.1f} s: {', '.join(self._parts)}")
