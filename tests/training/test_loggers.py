"""Trackers: what each writes, and that none of them stops a run."""

from __future__ import annotations

import json
import logging
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.training import loggers, metrics_file
from megatron.training.loggers import Progress
from tests.training import records_factory as make
from tests.training.run_config import tiny_run


class Collecting:
    """Remembers what it was given; fails on demand."""

    def __init__(self, broken: bool = False) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.broken = broken
        self.calls = 0
        self.closed = 0

    def log(self, record: Mapping[str, Any]) -> None:
        self.calls += 1
        if self.broken:
            raise ConnectionError("no route")
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1
        if self.broken:
            raise ConnectionError("no route")


def test_a_failing_tracker_is_reported_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="megatron")
    good, bad, now = Collecting(), Collecting(broken=True), [0.0]
    tracker = loggers.Trackers([bad, good], clock=lambda: now[0])
    for iteration in range(1, 8):
        tracker.log(make.step(iteration))
        now[0] += loggers.RETRY_S / 2
        bad.broken = iteration < 4
    tracker.close()
    tracker.close()
    assert [r["iteration"] for r in good.records] == [*range(1, 8)]
    assert [r["iteration"] for r in bad.records] == [5, 6, 7]
    assert bad.calls == 5  # 1 and 3 failed, 2 and 4 were not tried
    assert good.closed == bad.closed == 1
    assert [r.getMessage() for r in caplog.records] == [
        "Collecting failed: ConnectionError: no route; tried again every 60 s",
        "Collecting works again; 4 records lost",
    ]


def test_metrics_survive_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file size limit refuses in the middle of a line, as a disk does."""
    caplog.set_level(logging.INFO, logger="megatron")
    path = tmp_path / "metrics.jsonl"
    tracker = loggers.JsonlTracker(path)
    tracker.log(make.step(1))
    size = path.stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, limits[1]))
        tracker.log(make.step(2))
        tracker.log(make.step(3))
        assert [r["iteration"] for r in metrics_file.read(path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    tracker.log(make.step(4))
    tracker.close()
    assert [r["iteration"] for r in metrics_file.read(path)] == [1, 2, 3, 4]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "File too large" in said[0] and "no line is lost" in said[1]


def test_metrics_that_are_a_folder_are_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written"):
        loggers.start_jsonl(tiny_run(tmp_path), 0)


def test_a_tracker_that_fails_to_close_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    bad, last = Collecting(broken=True), Collecting()
    loggers.Trackers([bad, last]).close()
    assert last.closed == 1
    assert "was not closed cleanly" in caplog.text


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(Collecting):
        def log(self, record: Mapping[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loggers.Trackers([Interrupted()]).log(make.step(1))


def test_each_record_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = loggers.JsonlTracker(path)
    for iteration in (1, 2):
        tracker.log(make.step(iteration, float("nan")))
        lines = path.read_text().splitlines()
        assert len(lines) == iteration
        assert json.loads(lines[-1])["non_finite"] == {"loss": "nan"}
    tracker.close()
    again = loggers.JsonlTracker(path)
    again.log(make.step(3))
    again.close()
    assert [r["iteration"] for r in metrics_file.read(path)] == [1, 2, 3]


def test_a_rollback_drops_the_lines_of_the_steps_that_it_undoes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = loggers.JsonlTracker(path)
    for iteration in range(1, 6):
        tracker.log(make.step(iteration))
    tracker.log({"event": "rollback", "iteration": 2, "spike": 5})
    tracker.log(make.step(3))
    tracker.close()
    found = [(r["event"], r["iteration"]) for r in metrics_file.read(path)]
    assert found == [("step", 1), ("step", 2), ("rollback", 2), ("step", 3)]


def test_the_console_prints_lines_and_now_and_then_the_time_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    caplog.set_level(logging.INFO, logger="megatron")
    tracker = loggers.ConsoleTracker(Progress(every=30.0, clock=lambda: now[0]))
    tracker.log(make.step(1))
    now[0] = 40.0
    tracker.log(make.skip(2))
    tracker.log(make.evaluation(2))
    tracker.close()
    printed = [record.getMessage() for record in caplog.records]
    assert {record.name for record in caplog.records} == {"megatron.training_log"}
    assert [text.split("=")[0] for text in printed] == [
        "iteration",
        "iteration",
        "progress",
        "iteration",
    ]


def test_a_tracker_added_to_the_table_gets_the_records_of_the_rank_that_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, added = tiny_run(tmp_path, no_tensorboard=True, wandb_disabled=True), Collecting()
    started: list[int] = []
    monkeypatch.setitem(loggers.TRACKERS, "off", lambda run, iteration: None)
    monkeypatch.setitem(
        loggers.TRACKERS, "own", lambda run, iteration: started.append(iteration) or added
    )
    loggers.make_tracker(run, logs=False, iteration=4).log(make.step(5))
    assert not started and not list(tmp_path.iterdir())
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{metrics_file.encode(make.step(i))}\n" for i in range(1, 8)))
    tracker = loggers.make_tracker(run, logs=True, iteration=4)
    tracker.log(make.step(5))
    tracker.close()
    assert (started, [record["iteration"] for record in added.records]) == ([4], [5])
    assert [record["iteration"] for record in metrics_file.read(path)] == [1, 2, 3, 4, 5]


def test_without_trackers_anything_is_taken() -> None:
    tracker = loggers.Trackers()
    tracker.log({"event": "nap"})
    tracker.close()


def test_the_rest_is_estimated_from_the_steps_after_the_first() -> None:
    now = [1000.0]
    progress = Progress(every=30.0, clock=lambda: now[0])
    assert progress.line(11, 100) is None
    lines = {}
    for iteration in range(12, 101):
        now[0] += 10.0
        lines[iteration] = progress.line(iteration, 100)
    said = {iteration: text for iteration, text in lines.items() if text is not None}
    assert list(said)[:3] == [14, 17, 20]
    assert said[14] == "progress=14.0% | steps_left=86 | time_left=0:14:20"
    assert 100 not in said


def test_long_rests_are_shown_in_days() -> None:
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    progress.line(1, 10**6)
    now[0] = 60.0
    assert (
        progress.line(2, 10**6)
        == "progress=0.0% | steps_left=999998 | time_left=694 days, 10:38:00"
    )
