"""Meter with a clock that the test turns, and rates against published ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.state import RunState
from megatron.config import schema
from megatron.training import events
from megatron.training.meter import Meter
from megatron.training.metrics import METRICS, Metric
from tests.training.run_config import tiny_run

TINY = tiny_run(Path("runs/tiny"))  # 4 samples of 8 tokens
SMALL = dataclasses.replace(TINY, parallel=schema.ParallelConfig(tensor_parallel=1, world_size=2))
# A 3-layer 7B shape on 24 devices, every block recomputed: the run of the published log lines.
LOG_RUN = dataclasses.replace(
    TINY,
    model=dataclasses.replace(
        TINY.model, num_layers=3, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
        ffn_hidden_size=11008, seq_length=4096, vocab_size=32000,
    ),
    parallel=schema.ParallelConfig(tensor_parallel=1, world_size=24),
    train=dataclasses.replace(
        TINY.train, train_iters=635782, global_batch_size=768, activation_checkpointing="1"
    ),
)  # fmt: skip
COUNTS = TINY.architecture
STATE = RunState(5, 20, 160)


class Clock:
    """Seconds that only pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class FakeDevice:
    """As much of a device as a meter asks."""

    def __init__(self, peak: float | None, synchronize: Callable[[], None]) -> None:
        self.peak_tflops = peak
        self.synchronize = synchronize

    def memory_max_gib(self) -> float:
        return 1.5


def make(
    clock: Clock,
    run: schema.RunConfig = SMALL,
    peak: float | None = None,
    synchronize: Callable[[], None] = lambda: None,
    **changes: Any,
) -> Meter:
    device: Any = FakeDevice(peak, synchronize)
    return Meter(run, device, clock=clock, wall_clock=lambda: 7.0, **changes)


def rates(run: schema.RunConfig, seconds: float, peak: float | None = None) -> dict[str, Any]:
    """The record of a step of so many seconds."""
    clock = Clock()
    meter = make(clock, run, peak)
    clock.now += seconds
    meter.step(1.0, 1.0)
    return meter.record(STATE, 1e-3)


@pytest.mark.parametrize(
    ("milliseconds", "tgs", "samples", "lm", "ds"),
    [
        (29570.0, 4432.597, 25.972, 20.30, 26.18),
        (8457.2, 15498.234, 90.810, 70.98, 91.53),
        (7136.5, 18366.372, 107.615, 84.12, 108.46),
        (7147.0, 18339.524, 107.458, 84.00, 108.31),
    ],
)
def test_rates_are_those_of_the_published_log(
    milliseconds: float, tgs: float, samples: float, lm: float, ds: float
) -> None:
    """The log rounds the time to 0.1 ms: figures agree to 1e-5, TFLOPS to their last digit."""
    found = rates(LOG_RUN, milliseconds / 1000, peak=298.2)
    assert found["tokens_per_gpu_per_s"] == pytest.approx(tgs, rel=1e-5)
    assert found["samples_per_s"] == pytest.approx(samples, rel=1e-4)
    assert found["tflops_lm"] == pytest.approx(lm, abs=0.011)
    assert found["tflops_ds"] == pytest.approx(ds, abs=0.011)
    assert found["mfu"] == pytest.approx(lm / 298.2, rel=1e-3)
    assert found["tflops_causal"] < found["tflops_lm"]


def test_per_device_rates_are_the_global_ones_divided() -> None:
    found = rates(SMALL, 0.5)
    assert found["samples_per_s"] == 8
    assert found["tokens_per_s"] == 64
    assert found["tokens_per_gpu_per_s"] == 32
    assert found["tflops_lm"] == pytest.approx(32 * COUNTS.flops_per_token_lm(SMALL.model) / 1e12)
    assert found["mfu"] is None


def test_a_step_record_has_the_contracted_fields(clock: Clock) -> None:
    meter = make(clock)
    clock.now += 0.5
    meter.step(2.5, 1.25, 4.0)
    record = meter.record(STATE, 1e-3, {"code": 2.0})
    expected = {
        "event": "step",
        "iteration": 5,
        "train_iters": 100,
        "time": 7.0,
        "consumed_samples": 20,
        "consumed_tokens": 160,
        "learning_rate": 1e-3,
        "global_batch_size": 4,
        "seq_length": 8,
        "world_size": 2,
        "data_parallel": 2,
        "skipped_iterations": 0,
        "nan_iterations": 0,
        "steps": 1,
        "loss": 2.5,
        "grad_norm": 1.25,
        "loss_scale": 4.0,
        "elapsed_s": 0.5,
        "samples_per_s": 8.0,
        "tokens_per_s": 64.0,
        "tokens_per_gpu_per_s": 32.0,
        "tflops_lm": 32 * COUNTS.flops_per_token_lm(SMALL.model) / 1e12,
        "tflops_ds": 32 * COUNTS.flops_per_token_ds(SMALL.model) / 1e12,
        "tflops_causal": 32 * COUNTS.flops_per_token_causal(SMALL.model) / 1e12,
        "mfu": None,
        "memory_max_gib": 1.5,
        "corpus_loss": {"code": 2.0},
    }
    assert record == expected
    assert list(record) == list(expected)


def test_skipped_steps_and_what_is_off_the_clock_change_no_rate(clock: Clock) -> None:
    meter = make(clock)
    for loss in (1.0, 2.0, 6.0):
        clock.now += 2.0
        meter.step(loss, loss)
        with meter.off_the_clock():
            clock.now += 50.0
            meter.skip()
    record = meter.record(STATE, 1e-3)
    assert record["elapsed_s"] == pytest.approx(2.0)
    assert record["loss"] == 3.0
    assert record["grad_norm"] == 6.0
    assert record["steps"] == 3
    assert record["skipped_iterations"] == 3


def test_an_interval_without_work_has_no_rate_and_no_loss(clock: Clock) -> None:
    meter = make(clock)
    meter.skip()
    record = meter.record(STATE, 1e-3)
    assert record["event"] == "skip"
    assert record["skipped_iterations"] == 1
    assert not {"loss", "grad_norm", "elapsed_s", "tokens_per_s", "tflops_lm"} & record.keys()


def test_a_record_starts_the_next_interval(clock: Clock) -> None:
    meter = make(clock)
    clock.now += 1.0
    meter.step(1.0, 1.0)
    meter.skip()
    meter.record(STATE, 1e-3)
    clock.now += 4.0
    meter.step(5.0, None)
    record = meter.record(STATE.after(4, 32), 1e-3)
    assert (record["loss"], record["elapsed_s"], record["grad_norm"]) == (5.0, 4.0, None)
    assert record["skipped_iterations"] == 0


def test_time_off_the_clock_counts_when_it_ends_in_an_error(clock: Clock) -> None:
    meter = make(clock)
    with pytest.raises(OSError, match="full"), meter.off_the_clock():
        clock.now += 9.0
        raise OSError("disk full")
    clock.now += 1.0
    meter.step(1.0, 1.0)
    assert meter.record(STATE, 1e-3)["elapsed_s"] == 1.0


def test_an_overflow_is_work_without_an_update(clock: Clock) -> None:
    meter = make(clock)
    clock.now += 2.0
    meter.step(1.0, 1.0, 65536.0)
    meter.refused(1)
    record = meter.record(STATE, 1e-3)
    assert (record["event"], record["skipped_iterations"]) == ("step", 1)
    assert record["elapsed_s"] == 2.0


def test_a_nan_is_counted_and_not_averaged_away(clock: Clock) -> None:
    meter = make(clock)
    clock.now += 1.0
    meter.step(math.nan, math.inf)
    meter.step(1.0, 1.0)
    record = meter.record(STATE, 1e-3)
    assert math.isnan(record["loss"])
    assert record["nan_iterations"] == 1


@pytest.fixture
def added_row() -> Iterator[Metric]:
    row = Metric("watts", lambda i: 90.0 / i.seconds, "watts={watts:.1f}", 8.5, ("power/watts",))
    METRICS.append(row)
    yield row
    METRICS.remove(row)


@pytest.mark.usefixtures("added_row")
def test_a_metric_is_one_row(clock: Clock) -> None:
    """In the file, in the line, on dashboards; steps without work do not ask for it."""
    meter = make(clock)
    clock.now += 2.0
    meter.step(2.5, 1.25)
    record = meter.record(STATE, 1e-3)
    meter.skip()
    assert record["watts"] == 45.0
    assert "| lm loss=2.500000 | watts=45.0 | loss_scale=1.0 |" in events.line(record)
    assert events.scalars(record, 1)["power/watts"] == 45.0
    assert "power" in events.groups()
    assert "watts" not in meter.record(STATE, 1e-3)


class Counting:
    """A loss that counts how often it is fetched."""

    fetched = 0

    def __float__(self) -> float:
        Counting.fetched += 1
        return 1.0


def test_losses_are_fetched_at_log_time_only(clock: Clock) -> None:
    meter = make(clock)
    clock.now += 1.0
    for _ in range(3):
        meter.step(Counting(), Counting())
    assert Counting.fetched == 0
    meter.record(STATE, 1e-3)
    assert Counting.fetched == 6  # three losses, three norms


def test_the_last_record_has_each_of_its_steps(clock: Clock) -> None:
    meter = make(clock)
    clock.now += 1.0
    meter.step(torch.tensor(2.0), torch.tensor(3.0))
    meter.skip()
    meter.step(1.0, None)
    meter.record(STATE, 1e-3)
    assert meter.last == [(2.0, 3.0), None, (1.0, None)]
    meter.skip()
    meter.record(STATE, 1e-3)
    assert meter.last == [None]


def test_tensors_become_plain_floats(clock: Clock) -> None:
    meter = make(clock)
    clock.now += 1.0
    meter.step(torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(3.0))
    record = meter.record(STATE, 1e-3)
    assert type(record["loss"]) is float
    assert type(record["grad_norm"]) is float


def test_the_device_is_waited_for_before_the_clock_is_read(clock: Clock) -> None:
    """Work that is queued when a pause or an interval ends belongs to the steps before it."""

    def synchronize() -> None:
        clock.now += sum(queued)
        queued.clear()

    queued: list[float] = []
    meter = make(clock, synchronize=synchronize)
    meter.step(1.0, 1.0)
    queued.append(3.0)
    with meter.off_the_clock():
        clock.now += 100.0
        queued.append(10.0)  # queued by what is off the clock: not the step's
    meter.step(1.0, 1.0)
    queued.append(1.0)
    assert meter.record(STATE, 1e-3)["elapsed_s"] == pytest.approx((3.0 + 1.0) / 2)


def test_more_devices_at_equal_speed_halve_the_per_device_rate() -> None:
    double = dataclasses.replace(SMALL, parallel=dataclasses.replace(SMALL.parallel, world_size=4))
    assert rates(double, 1.0)["tokens_per_s"] == rates(SMALL, 1.0)["tokens_per_s"]
    assert rates(double, 1.0)["tflops_lm"] == rates(SMALL, 1.0)["tflops_lm"] / 2


def test_what_the_engine_measures_is_asked_for_by_every_record(clock: Clock) -> None:
    """It may be a collective, which no rank may leave out; a record without work has none of it."""
    asked: list[int] = []

    def measured() -> dict[str, float]:
        asked.append(1)
        return {"pipeline_bubble": 0.25}

    meter = make(clock, measured=measured)
    meter.skip()
    assert "pipeline_bubble" not in meter.record(RunState(iteration=1), 0.1)
    meter.step(1.0, 1.0)
    clock.now += 1
    assert meter.record(RunState(iteration=2), 0.1)["pipeline_bubble"] == 0.25
    assert len(asked) == 2
