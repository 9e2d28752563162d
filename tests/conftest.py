"""Of all tests: a time after which none starts, and a flag of the processor that none keeps."""

from __future__ import annotations

import os
import sys
import time

import pytest

UNTIL = float(os.environ.get("TESTS_UNTIL", "inf"))
"""Seconds since 1970; `.ci/run` sets it, so that a slow machine's run ends with what it found."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > UNTIL:
        pytest.skip(f"NOT RUN, no time was left: {item.path.relative_to(item.config.rootpath)}")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Denormals are numbers again, for the next test of whatever file."""
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)
