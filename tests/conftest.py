"""Of all tests: a time after which none starts, for a machine that others slow down."""

from __future__ import annotations

import os
import time

import pytest

UNTIL = float(os.environ.get("TESTS_UNTIL", "inf"))
"""Seconds since 1970; `.ci/run` sets it, so that a slow machine's run ends with what it found."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > UNTIL:
        pytest.skip(f"NOT RUN, no time was left: {item.path.relative_to(item.config.rootpath)}")
