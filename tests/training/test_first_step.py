"""What is said once a start: the time until it is ready, and the memory after the first steps."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import pytest
import torch

from megatron.training import start_up
from megatron.training.first_step import FirstStep
from tests.training import records_factory as make
from tests.training.run_config import tiny_run


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_start_up_time_by_part(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = [psutil.Process().create_time() + 5]
    monkeypatch.setattr(start_up.time, "time", lambda: now[0])
    clock = start_up.StartUp()
    for name, seconds in (("ranks", 0.04), ("data", 0.46), ("model", 2)):
        now[0] += seconds
        clock.took(name)
    clock.log()
    assert lines(caplog) == ["start-up time: 7.5 s: imports 5.0, data 0.5, model 2.0"]


def test_resident_memory_on_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tracker = FirstStep(tiny_run(tmp_path))
    for record in (make.skip(1), make.step(2), make.step(3)):
        tracker.log(record)
    tracker.close()
    (memory,) = lines(caplog)
    assert memory == "[Rank 0] (after 2 iterations) memory (MiB) | max resident: 1536.0"


def test_the_allocators_four_numbers_on_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for number, name in enumerate(("memory_allocated", "max_memory_allocated",
                                   "memory_reserved", "max_memory_reserved"), 1):  # fmt: skip
        monkeypatch.setattr(torch.accelerator, name, lambda number=number: number * 2**20)
    FirstStep(tiny_run(tmp_path)).log(make.step(1))
    text = "allocated: 1.0 | max allocated: 2.0 | reserved: 3.0 | max reserved: 4.0"
    assert lines(caplog)[0].endswith(f"(after 1 iterations) memory (MiB) | {text}")
