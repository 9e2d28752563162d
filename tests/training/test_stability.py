"""Scores: exact on known windows, and rarely a false alarm on curves as runs have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.training.stability import MAD_TO_DEVIATION, Judgement, SpikeDetector

VALUES = st.floats(1e-3, 1e3)


def filled(pairs: list[tuple[float, float]], window: int = 32, z: float = 8.0) -> SpikeDetector:
    detector = SpikeDetector(window, z)
    for loss, norm in pairs:
        detector.add(detector.judge(loss, norm))
    return detector


def flat(detector: SpikeDetector) -> Judgement:
    return detector.judge(2.0, 1.0)


def test_the_score_is_the_distance_from_the_median_in_deviations() -> None:
    losses = [2.0 + 0.1 * (i % 5) for i in range(20)]  # median 2.2, MAD 0.1
    judgement = filled([(loss, 1.0) for loss in losses]).judge(2.5, math.e)
    assert judgement.steps == 20
    assert judgement.loss.median == pytest.approx(2.2)
    assert judgement.loss.z == pytest.approx(0.3 / (MAD_TO_DEVIATION * 0.1))
    assert judgement.grad_norm.median == pytest.approx(1.0)
    assert judgement.grad_norm.z == pytest.approx(1.0 / 0.1)  # the floor, in logarithms
    assert judgement.is_spike


@pytest.mark.parametrize(("window", "needed"), [(16, 16), (30, 16), (64, 32), (128, 64)])
def test_half_a_window_is_needed_and_at_least_sixteen(window: int, needed: int) -> None:
    steps = [(2.0, 1.0)] * needed
    assert filled(steps[1:], window).judge(50.0, 50.0).loss.z is None
    assert not filled(steps[1:], window).judge(50.0, 50.0).is_spike
    assert filled(steps, window).judge(50.0, 50.0).is_spike


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_spike_at_once_and_never_enters(bad: float) -> None:
    for pairs in ([], [(2.0, 1.0)] * 20):
        for loss, norm in ((bad, 1.0), (2.0, bad)):
            detector = filled(pairs)
            judgement = detector.judge(loss, norm)
            assert judgement.is_spike and not judgement.finite
            detector.add(judgement)
            assert flat(detector).steps == len(pairs)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=16, max_size=40), VALUES, VALUES)
def test_a_value_below_the_median_is_never_a_spike(
    pairs: list[tuple[float, float]], loss: float, norm: float
) -> None:
    judgement = filled(pairs, window=16, z=1e9).judge(loss, norm)
    if loss <= judgement.loss.median and norm <= judgement.grad_norm.median * (1 - 1e-9):
        assert judgement.loss.z <= 0 and judgement.grad_norm.z <= 0
    assert math.isfinite(judgement.loss.z) and math.isfinite(judgement.grad_norm.z)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=16, max_size=40), st.permutations(range(16)))
def test_the_order_inside_the_window_does_not_matter(
    pairs: list[tuple[float, float]], order: list[int]
) -> None:
    last = pairs[-16:]
    one, other = filled(last, 16, 1e9), filled([last[i] for i in order], 16, 1e9)
    assert one.judge(7.0, 7.0) == other.judge(7.0, 7.0)


@given(st.lists(st.tuples(VALUES, VALUES), max_size=60), st.integers(16, 40))
def test_the_window_is_the_last_steps_that_were_no_spikes(
    pairs: list[tuple[float, float]], window: int
) -> None:
    detector, kept = SpikeDetector(window, 8.0), []
    for loss, norm in pairs:
        judgement = detector.judge(loss, norm)
        detector.add(judgement)
        kept += [] if judgement.is_spike else [(loss, norm)]
    if len(pairs) - len(kept) < 16:  # no new level
        assert flat(detector) == flat(filled(kept[-window:], window, 1e9))


def test_a_flat_window_does_not_make_rounding_a_spike() -> None:
    detector = filled([(2.0, 1.0)] * 32)
    assert not detector.judge(2.0 * 1.07, math.exp(0.79)).is_spike  # 7 floors, 7.9 floors
    assert detector.judge(2.0 * 1.09, 1.0).is_spike
    assert detector.judge(2.0, math.exp(0.81)).is_spike
    zeros = filled([(0.0, 0.0)] * 32)
    assert not zeros.judge(0.0, 0.0).is_spike and zeros.judge(1.0, 0.0).is_spike


def test_as_many_spikes_in_a_row_as_half_a_window_are_a_new_level() -> None:
    detector = filled([(2.0, 1.0)] * 32)
    for number in range(16):
        assert detector.judge(5.0, 1.0).is_spike, number
        detector.add(detector.judge(5.0, 1.0))
    assert flat(detector).steps == 0
    for _ in range(40):
        assert not detector.judge(5.0, 1.0).is_spike
        detector.add(detector.judge(5.0, 1.0))


def alarms(losses: np.ndarray, norms: np.ndarray, window: int) -> int:
    detector, count = SpikeDetector(window, 8.0), 0
    for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
        judgement = detector.judge(loss, norm)
        detector.add(judgement)
        count += judgement.is_spike
    return count


STEPS = 4000
TAILS = {"normal": None, "t5": 5.0, "t4": 4.0}
"""Of the noise, which is scaled to deviation 1; t4 is heavier than runs show away from spikes."""


def noise(rng: np.random.Generator, tail: float | None) -> np.ndarray:
    if tail is None:
        return rng.normal(size=STEPS)
    return rng.standard_t(tail, STEPS) / math.sqrt(tail / (tail - 2))


@pytest.mark.parametrize("window", [32, 128])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("loss_noise", "norm_noise"), [(0.005, 0.1), (0.03, 0.3), (0.1, 0.5)])
def test_false_alarms_on_curves_as_runs_have_them(
    loss_noise: float, norm_noise: float, tail: str, window: int
) -> None:
    """A fast and a slow decay; norms that fall, rise again after warm-up, with noise as a factor.

    Simulated over 10,000 steps: none with normal noise; t5 0 to 4 of a loss and 0 to 3 of a norm;
    t4 2 of a loss and 1 to 6 of a norm. Norms compared without logarithms gave 14 to 90.
    """
    rng, t = np.random.default_rng(1), np.arange(STEPS)
    losses = 1.9 + 9 * np.exp(-t / 60) + 1.5 * (1 + t / 100) ** -0.4
    norms = 0.3 + 4 * np.exp(-t / 100) + 0.5 * np.exp(-((t - 500) ** 2) / 2 / 150**2)
    found = alarms(
        losses + loss_noise * noise(rng, TAILS[tail]),
        norms * np.exp(norm_noise * noise(rng, TAILS[tail])),
        window,
    )
    assert found <= {"normal": 0, "t5": 6, "t4": 10}[tail], found


@pytest.mark.parametrize("window", [32, 128])
def test_a_spike_of_a_run_is_found(window: int) -> None:
    """PaLM-like: the loss jumps by half a nat for a few steps, the norm tenfold with it."""
    rng = np.random.default_rng(2)
    losses, norms = 2.5 + 0.03 * rng.normal(size=400), np.exp(0.3 * rng.normal(size=400))
    spikes = [300, 301, 302]
    losses[spikes] += 0.5
    detector = SpikeDetector(window, 8.0)
    found = []
    for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True)):
        judgement = detector.judge(loss, norm)
        detector.add(judgement)
        found += [step] if judgement.is_spike else []
    assert found == spikes
