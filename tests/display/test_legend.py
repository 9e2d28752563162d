"""docs/log.md names every field of the log's lines and every key of metrics.jsonl."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.training.events import EVENTS
from megatron.training.metrics import METRICS

PAGE = (Path(__file__).resolve().parents[2] / "docs/log.md").read_text()
NAMED = {name for line in PAGE.splitlines() for name in re.findall(r"`([^`]+)`", line)}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_a_key_and_its_field_are_explained(metric: object) -> None:
    key, console = vars(metric)["key"], vars(metric)["console"]
    assert key in NAMED
    if isinstance(console, str) and console:
        assert console.partition("=")[0] in NAMED


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_and_its_keys_are_explained(event: str) -> None:
    assert event in NAMED
    line = EVENTS[event].line
    keys = re.findall(r"{(\w+)[}:]", line) if isinstance(line, str) else []
    assert [key for key in keys if key not in NAMED] == []
