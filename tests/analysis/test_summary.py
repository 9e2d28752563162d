"""Rates from raw sums."""

from __future__ import annotations

import pytest

from megatron.analysis.summary import flatten, throughput, training_steps
from tests.training import records_factory as make


def test_rates_are_tokens_over_seconds_not_means_of_rates() -> None:
    """Ten slow and one long fast interval: the mean of the rates would be far off."""
    records = [make.step(i, elapsed_s=1.0) for i in range(1, 11)]
    records.append(make.step(30, steps=20, elapsed_s=0.1, tflops_lm=30.0))
    found = throughput(records, warm_up=0)
    assert found is not None
    assert found.steps == 30
    assert found.tokens == 30 * 4 * 8
    assert found.seconds == pytest.approx(12.0)
    assert found.tokens_per_s == pytest.approx(80.0)
    assert found.tokens_per_gpu_per_s == pytest.approx(40.0)
    assert found.tflops_lm == pytest.approx((10 * 3.0 + 2 * 30.0) / 12)


def test_warm_up_skips_and_evaluations_are_left_out() -> None:
    records = [make.step(i, elapsed_s=100.0) for i in (1, 2, 3)]
    records += [make.skip(4), make.evaluation(4), make.save(4)]
    records += [make.step(i, elapsed_s=0.25 * i) for i in range(5, 10)]
    found = throughput(records)
    assert found is not None
    assert found.steps == 5
    assert found.seconds == pytest.approx(0.25 * (5 + 6 + 7 + 8 + 9))
    assert found.step_seconds == pytest.approx((1.35, 1.75, 2.15))


def test_a_short_run_keeps_half() -> None:
    assert getattr(throughput([make.step(1)]), "steps", None) == 1
    assert getattr(throughput([make.step(i) for i in (1, 2, 3)]), "steps", None) == 2


def test_a_run_without_work_has_no_rate() -> None:
    assert throughput([make.skip(1), make.evaluation(1)]) is None


def test_a_step_done_twice_counts_once() -> None:
    found = training_steps([make.step(2, 9.0), make.step(1), make.step(2, 1.0)])
    assert [(r["iteration"], r["loss"]) for r in found] == [(1, 2.0), (2, 1.0)]


def test_flatten_joins_names() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {
        "a.b.c": 1,
        "a.d": [2],
        "e": None,
    }
