"""Warm-up and decay given in steps, samples or tokens."""

from __future__ import annotations

import pytest

from megatron.config.pace import learning_rates
from tests.config.helpers import configured, refusal, resolved

RUN = {"GLOBAL_BATCH": 8, "TRAIN_ITERS": 100, "LR": 1e-3, "SEQ": 128, "MIN_LR": 0}


@pytest.mark.parametrize(
    "warmup",
    [{"LR_WARMUP_ITERS": 7}, {"LR_WARMUP_SAMPLES": 56}, {"LR_WARMUP_TOKENS": 56 * 128}],
)
def test_a_warm_up_of_seven_steps(warmup: dict[str, int]) -> None:
    rate = learning_rates(configured(**RUN, **warmup))
    assert [rate(i) for i in range(1, 8)] == pytest.approx([1e-3 * i / 7 for i in range(1, 8)])
    assert rate(8) < rate(7), "the eighth step decays"
    same = learning_rates(configured(**RUN, LR_WARMUP_FRAC=0.07))
    assert [rate(i) for i in range(1, 101)] == pytest.approx([same(i) for i in range(1, 101)])


def test_none_and_part_of_a_step() -> None:
    none = learning_rates(configured(**RUN, LR_WARMUP_ITERS=0))
    assert none(1) == learning_rates(configured(**RUN, LR_WARMUP_FRAC=0))(1)
    part = configured(**RUN, LR_WARMUP_TOKENS=int(2.5 * 8 * 128))
    assert learning_rates(part)(1) == pytest.approx(1e-3 / 2.5)
    assert resolved(**RUN, LR_WARMUP_TOKENS=1024).sources["optimizer.lr_warmup_fraction"] == (
        "LR_WARMUP_TOKENS / LR_DECAY_ITERS"
    )


def test_a_decay_in_samples_or_tokens() -> None:
    for decay in ({"LR_DECAY_SAMPLES": 403}, {"LR_DECAY_TOKENS": 403 * 128}):
        assert configured(**RUN, **decay).optimizer.lr_decay_iters == 50
    both = configured(**RUN, LR_DECAY_SAMPLES=400, LR_WARMUP_ITERS=10).optimizer
    assert both.lr_warmup_fraction == 0.2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"LR_WARMUP_ITERS": 7, "LR_WARMUP_FRAC": 0.1},
         ["LR_WARMUP_FRAC=0.1 and LR_WARMUP_ITERS=7"]),
        ({"LR_WARMUP_ITERS": 0, "LR_WARMUP_TOKENS": 5},
         ["LR_WARMUP_ITERS=0", "LR_WARMUP_TOKENS=5"]),
        ({"LR_DECAY_ITERS": 7, "LR_DECAY_TOKENS": 5}, ["LR_DECAY_ITERS=7 and LR_DECAY_TOKENS=5"]),
        ({"LR_WARMUP_ITERS": 100}, ["LR_WARMUP_ITERS=100 is not shorter", "LR_DECAY_ITERS=100"]),
        ({"LR_WARMUP_SAMPLES": 800}, ["800 samples, LR_DECAY_ITERS=100 is 800 samples"]),
        ({"LR_DECAY_SAMPLES": 7}, ["LR_DECAY_SAMPLES=7 is less than one step"]),
    ],
)  # fmt: skip
def test_contradictions_are_refused(settings: dict[str, object], words: list[str]) -> None:
    message = refusal(**RUN, **settings)
    assert all(word in message for word in words), message


def test_with_a_growing_batch_progress_is_counted_in_samples() -> None:
    """A step of a quarter of the batch is a quarter of a step of the schedule."""
    ramp = {**RUN, "MICRO_BATCH": 2, "RAMPUP_BATCH_SIZE": "2 6 80"}  # 40 steps of 2, then of 8
    run = configured(**ramp, LR_WARMUP_ITERS=20, LR_DECAY_STYLE="linear")
    rate, total = learning_rates(run), 80 + 60 * 8
    assert run.total_samples == total
    assert [rate(i) for i in (1, 10, 20)] == pytest.approx([1e-3 * i / 20 for i in (1, 10, 20)])
    for step, consumed in ((40, 80), (41, 88), (70, 320), (100, total)):
        assert rate(step) == pytest.approx(1e-3 * (total - consumed) / (total - 40))
    assert rate(101) == 0.0
    by_samples = configured(**ramp, LR_WARMUP_SAMPLES=40, LR_DECAY_STYLE="linear")
    assert learning_rates(by_samples)(33) == pytest.approx(rate(33))
