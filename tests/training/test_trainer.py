"""The loop around an engine that only adds up what it is fed."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.checkpoint import store
from megatron.config.schema import RunConfig
from megatron.data.dataset import Sample
from megatron.parallel.control import ALONE
from megatron.parallel.groups import SERIAL
from megatron.parallel.piece import WEIGHT, Piece
from megatron.training.device import Device
from megatron.training.metrics_file import decode, encode
from megatron.training.resume import resume
from megatron.training.stop import STOP_FILE, StopRequest
from megatron.training.trainer import Outcome, Trainer
from tests.training.run_config import tiny_run

CPU = Device("cpu", 0, "processor", "gloo", None)


class Numbers:
    """Sample k is full of the number k."""

    def sample(self, k: int) -> Sample:
        return Sample("corpus", "file", 0, k, tokens=np.full(9, k, dtype=np.int64))


class Shards:
    """The engine's sum as a checkpoint's only parameter."""

    def __init__(self, engine: Adder) -> None:
        self._engine = engine

    def pieces(self) -> list[Piece]:
        return [Piece("sum", (1,), None, 0, 1, 0, {WEIGHT: self._engine.total.clone()})]

    spans = pieces

    def finite(self) -> bool:
        return bool(self._engine.total.isfinite())

    def load(self, read: Callable[[Piece], Any], load_optimizer: bool = True) -> None:
        tensors, _ = read(self.pieces()[0])
        self._engine.total = tensors[WEIGHT].clone()

    def counters(self) -> dict[str, float]:
        return {}

    def load_counters(self, values: dict[str, float]) -> None:
        assert values == {}

    scaler_state, load_scaler_state = counters, load_counters


class Adder:
    """An engine whose weight is the sum of all samples it was trained on.

    `at` maps the number of a call of train_batch to what happens in it.
    """

    def __init__(self, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.groups = SimpleNamespace(pp=SERIAL, dp=SERIAL, tp=SERIAL, sp=SERIAL)
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self.device = torch.device("cpu")
        self.total = torch.zeros(1, dtype=torch.float64)
        self.trained: list[int] = []  # samples, in order
        self.evaluated: list[list[int]] = []
        self.rates: list[float] = []
        self.accumulation: list[int] = []  # as set before each step
        self.losses: dict[int, float] = {}  # call -> what it returns instead of its number
        self.step_applied, self.loss_scale = True, 1.0
        self._at = at or {}
        self._calls = 0

    def train_batch(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        self._calls += 1
        for tokens, _ in batches:
            numbers = tokens[:, 0].tolist()
            self.trained += numbers
            self.total += sum(numbers)
        self._at.get(self._calls, lambda: None)()
        return torch.tensor(self.losses.get(self._calls, float(self._calls)))

    def eval_batch(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        self.evaluated.append([n for tokens, _ in batches for n in tokens[:, 0].tolist()])
        return torch.tensor(2.0)

    def set_learning_rate(self, rate: float) -> None:
        self.rates.append(rate)

    def set_accumulation_steps(self, steps: int) -> None:
        self.accumulation.append(steps)

    def gradient_norm(self) -> float:
        return 0.5

    def refresh_weights(self) -> None:
        pass

    def pipeline_bubble(self) -> None:
        return None

    def shards(self) -> Shards:
        return Shards(self)


class Records(list):
    """A tracker that keeps everything."""

    def log(self, record: dict[str, Any]) -> None:
        self.append(decode(encode(record)))

    def close(self) -> None:
        pass

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self if record["event"] == event]


def config(
    folder: Path, steps: int, *, save: int = 0, skip: str | None = None, **log: Any
) -> RunConfig:
    """`steps` steps of four samples each, in two micro-batches."""
    run = tiny_run(folder, **{"eval_interval": 0, **log})
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, train_iters=steps),
        checkpoint=dataclasses.replace(run.checkpoint, save_interval=save),
        data=dataclasses.replace(run.data, train_range_to_skip=skip),
    )


def trained(run: RunConfig, engine: Any) -> tuple[Outcome, Records]:
    """A start of the run: resumes where there is a checkpoint, and trains."""
    numbers = Numbers()
    splits = SimpleNamespace(train=numbers, valid=numbers, test=None)
    data: Any = SimpleNamespace(splits=splits, corpus_losses=None, record=None)
    records = Records()
    with StopRequest(run.run_folder / "STOP") as stop:
        state = resume(run, engine, None, ALONE)
        return Trainer(run, engine, data, CPU, records, stop, state).train(), records


def interrupt() -> None:
    """A signal to this process, as a scheduler sends it."""
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_record_covers_the_steps_of_its_interval(tmp_path: Path) -> None:
    engine = Adder()
    engine.losses = {3: float("nan")}
    outcome, records = trained(config(tmp_path, 12, log_interval=5), engine)
    steps = records.of("step")
    assert [record["iteration"] for record in steps] == [5, 10, 12]
    assert [record["steps"] for record in steps] == [5, 5, 2]
    assert [record["loss"] for record in steps[1:]] == [8.0, 11.5]  # means of 6..10 and 11, 12
    assert [record["nan_iterations"] for record in steps] == [1, 0, 0]
    assert outcome.state.nan_iterations == 1
    assert outcome.state.consumed_samples == 48 and outcome.state.consumed_tokens == 48 * 8
    assert engine.trained == [*range(48)]
    assert len(engine.rates) == 12 and steps[-1]["learning_rate"] == engine.rates[-1]
    assert records[-1]["event"] == "stop" and records[-1]["reason"] == "finished"


def test_a_step_that_changed_no_weight_counts_as_skipped(tmp_path: Path) -> None:
    engine = Adder()
    engine.step_applied = False
    outcome, records = trained(config(tmp_path, 4, log_interval=2), engine)
    assert [record["skipped_iterations"] for record in records.of("step")] == [2, 2]
    assert outcome.state.skipped_iterations == 4 and len(engine.trained) == 16


def test_a_failed_save_is_logged_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "checkpoints"
    blocked.write_text("a file where the folder belongs")
    run = config(tmp_path, 6, save=2)
    outcome, records = trained(run, Adder({5: blocked.unlink}))
    assert [record["iteration"] for record in records.of("save")] == [6]
    assert outcome.error == "" and outcome.saved_at == outcome.state.iteration == 6
    failures = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert len(failures) == 2 and "step 2 was not saved" in failures[0]


def test_a_failed_last_save_is_not_taken_for_saved(tmp_path: Path) -> None:
    run = config(tmp_path, 4, save=2)

    def block() -> None:
        for folder in (tmp_path / "checkpoints").iterdir():
            if folder.is_dir():
                folder.rename(tmp_path / folder.name)
        for file in (tmp_path / "checkpoints").iterdir():
            file.unlink()
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").write_text("a file")

    outcome, records = trained(run, Adder({4: block}))
    assert [record["iteration"] for record in records.of("save")] == [2]
    assert outcome.state.iteration == 4 and outcome.saved_at == 2
    assert "step 4 was not saved" in outcome.error


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_a_signal_at_any_step_ends_in_a_checkpoint_that_resumes(
    tmp_path_factory: pytest.TempPathFactory, at: int, log_interval: int, save: int
) -> None:
    run = config(tmp_path_factory.mktemp("run"), 9, save=save, log_interval=log_interval)
    first = Adder({at: interrupt})
    outcome, records = trained(run, first)
    assert outcome.cause == signal.SIGTERM and outcome.saved_at == at and not outcome.error
    assert outcome.state.iteration == at == records.of("save")[-1]["iteration"]
    assert records[-1]["event"] == "stop" and records[-1]["reason"] == "signal SIGTERM"
    assert store.committed(run.checkpoint_folder)[0].iteration == at
    if at == 9:
        return
    second = Adder()
    outcome, _ = trained(run, second)
    assert outcome.state.iteration == 9 and outcome.cause == 0
    assert first.trained + second.trained == [*range(36)]
    assert second.total == sum(range(36))


def test_skipped_steps_read_nothing_and_every_other_step_sees_its_own_samples(
    tmp_path: Path,
) -> None:
    engine = Adder()
    outcome, records = trained(config(tmp_path, 6, skip="2-3,6-6"), engine)
    assert engine.trained == [*range(4), *range(12, 20)]
    assert [record["iteration"] for record in records.of("skip")] == [2, 3, 6]
    assert all("loss" not in record for record in records.of("skip"))
    assert outcome.state.consumed_samples == 24 and outcome.state.skipped_iterations == 3
    assert outcome.saved_at == 6


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_range_to_skip_holds_over_a_resume(tmp_path: Path, at: int) -> None:
    """A signal before and after it: calls 2, 3 and 4 of train_batch are steps 2, 3 and 7."""
    run = config(tmp_path, 8, skip="4-6")
    first, second = Adder({at: interrupt}), Adder()
    trained(run, first)
    without = config(tmp_path, 8)  # what was skipped stays in the checkpoint
    outcome, _ = trained(without, second)
    assert first.trained + second.trained == [*range(12), *range(24, 32)]
    assert outcome.state.skipped_iterations == 3
    assert outcome.state.skip_ranges == ((4, 6),)


def test_evaluations_read_the_same_samples_and_leave_the_run_alone(tmp_path: Path) -> None:
    engine = Adder()
    outcome, records = trained(config(tmp_path, 4, eval_interval=2, eval_iters=3), engine)
    evaluations = records.of("eval")
    assert [record["iteration"] for record in evaluations] == [2, 4]
    assert engine.evaluated[:3] == engine.evaluated[3:] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11],
    ]  # fmt: skip
    assert all(record["samples"] == 12 and record["loss"] == 2.0 for record in evaluations)
    assert engine.trained == [*range(16)] and outcome.state.consumed_samples == 16


@pytest.mark.parametrize("log_interval", [1, 1000])
def test_a_signal_in_an_evaluation_ends_it_and_saves(tmp_path: Path, log_interval: int) -> None:
    engine = Adder()
    evaluate = engine.eval_batch

    def interrupted(batches: Any) -> torch.Tensor:
        if len(engine.evaluated) == 1:
            interrupt()
        return evaluate(batches)

    engine.eval_batch = interrupted  # type: ignore[method-assign]
    run = config(tmp_path, 8, eval_interval=3, eval_iters=100, log_interval=log_interval)
    outcome, records = trained(run, engine)
    assert len(engine.evaluated) == 2 and records.of("eval") == []
    assert outcome.state.iteration == outcome.saved_at == 3 and outcome.cause == signal.SIGTERM


def test_the_stop_file_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path, 8)
    clock = itertools.count(0, 10)
    monkeypatch.setattr(
        StopRequest.__init__, "__defaults__", (None, None, None, clock.__next__, ())
    )
    outcome, records = trained(run, Adder({3: (run.run_folder / "STOP").touch}))
    assert outcome.state.iteration == outcome.saved_at == 3 and outcome.cause == STOP_FILE
    assert "STOP" in records[-1]["reason"]


def test_exit_interval_saves_and_stops_at_its_multiples(tmp_path: Path) -> None:
    run = config(tmp_path, 8)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, exit_interval=3))
    assert [trained(run, Adder())[0].saved_at for _ in range(3)] == [3, 6, 8]
