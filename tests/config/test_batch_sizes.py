"""The batch that grows, against Megatron's rule applied step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.batch_sizes import BatchSizes
from tests.config.helpers import configured, refusal, resolved


def step_by_step(sizes: BatchSizes, steps: int) -> list[int]:
    """Sizes of the first steps: start + increment x int(consumed / (samples / increments))."""
    found, consumed = [], 0
    for _ in range(steps):
        if consumed > sizes.samples:
            size = sizes.full
        else:
            each = sizes.samples / ((sizes.full - sizes.start) / sizes.increment)
            size = sizes.start + int(consumed / each) * sizes.increment
        assert size <= sizes.full
        found.append(size)
        consumed += size
    return found


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 200))
def test_equals_the_rule_step_by_step(start: int, increment: int, phases: int, part: int) -> None:
    samples = part * phases  # parts of whole samples: no rounding in the reference
    sizes = BatchSizes(start + phases * increment, start, increment, samples)
    expected = step_by_step(sizes, 60)
    consumed = [sum(expected[:step]) for step in range(61)]
    assert [sizes.consumed(step) for step in range(61)] == consumed
    assert [sizes.at(before) for before in consumed[:60]] == expected
    for samples in range(0, consumed[-1], 3):
        whole = sum(after <= samples for after in consumed[1:])
        assert sizes.steps(samples) == whole


def test_a_constant_batch() -> None:
    sizes = configured(GLOBAL_BATCH=16).batch_sizes
    assert (sizes.at(0), sizes.consumed(7), sizes.steps(33)) == (16, 112, 2)


RAMP = {"GLOBAL_BATCH": 8, "MICRO_BATCH": 2, "RAMPUP_BATCH_SIZE": "2 2 12"}
# 2 2 | 4 | 6 | 8 8 ...: phases of 4 samples


def test_steps_samples_and_tokens_of_a_run_with_a_ramp() -> None:
    assert [configured(**RAMP).batch_sizes.consumed(n) for n in range(7)] == [
        0, 2, 4, 8, 14, 22, 30,
    ]  # fmt: skip
    by_samples = resolved(**RAMP, TRAIN_SAMPLES=29)
    assert by_samples.run.train.train_iters == 5 and by_samples.run.total_samples == 22
    assert by_samples.run.train.train_tokens == 22 * 128
    source = by_samples.sources["train.train_iters"]
    assert source == "TRAIN_SAMPLES / GLOBAL_BATCH, RAMPUP_BATCH_SIZE"
    assert configured(**RAMP, TRAIN_TOKENS=30 * 128).train.train_iters == 6
    assert configured(**RAMP, TRAIN_ITERS=4).train.train_tokens == 14 * 128
    assert configured(**RAMP, TRAIN_ITERS=4, TRAIN_SAMPLES=14, TRAIN_TOKENS=14 * 128)
    flags = ("--rampup-batch-size", "2", "2", "12", "--train-samples", "29")
    assert configured(*flags, GLOBAL_BATCH=8, MICRO_BATCH=2).train == by_samples.run.train


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"RAMPUP_BATCH_SIZE": "2 2"}, ["RAMPUP_BATCH_SIZE=2 2", "three whole numbers"]),
        ({"RAMPUP_BATCH_SIZE": "8 2 12"}, ["START 8", "below GLOBAL_BATCH=8"]),
        ({"RAMPUP_BATCH_SIZE": "2 0 12"}, ["at least 1"]),
        ({"RAMPUP_BATCH_SIZE": "2 4 12"}, ["(8 - 2) / 4 leaves 2", "START to 4"]),
        ({"WORLD_SIZE": 2, "MICRO_BATCH": 2, "RAMPUP_BATCH_SIZE": "2 2 12"},
         ["START 2", "MICRO_BATCH=2 x DP=2 = 4", "2 / 4 leaves 2", "MICRO_BATCH=1"]),
        ({"TRAIN_SAMPLES": 1}, ["TRAIN_SAMPLES=1", "less than one step", "TRAIN_SAMPLES=2"]),
        ({"TRAIN_SAMPLES": 22, "TRAIN_ITERS": 4},
         ["TRAIN_ITERS=4, but TRAIN_SAMPLES=22 is 5 steps", "set TRAIN_SAMPLES=14"]),
        ({"TRAIN_SAMPLES": 22, "TRAIN_TOKENS": 14 * 128},
         ["TRAIN_SAMPLES=22 is 5 steps, but TRAIN_TOKENS=1792 is 4 steps"]),
        ({"PIPELINE_SCHEDULE": "dualpipev", "PP": 2, "NLAYERS": 4},
         ["1 micro-batches", "2 x PP=2 = 4", "START 8"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_arithmetic(
    settings: dict[str, object], words: list[str]
) -> None:
    message = refusal(**{**RAMP, **settings})
    assert all(word in message for word in words), message


def test_a_ramp_that_the_run_does_not_finish_is_said() -> None:
    (warning,) = resolved(**RAMP, TRAIN_ITERS=3).warnings
    assert "takes 12 samples, but the run has 8" in warning
    assert resolved(**RAMP, TRAIN_ITERS=4).warnings == []
