"""The learning rate against closed forms written with numpy, and against published log figures."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.schedule import STYLES, learning_rate
from megatron.config.schema import OptimizerConfig, by_key

BASE = OptimizerConfig(
    learning_rate=3e-3,
    min_learning_rate=3e-4,
    lr_decay_iters=200,
    lr_warmup_fraction=0.1,
    lr_cooldown_fraction=0.4,
    lr_constant=1e-3,
    lr_constant_fraction=0.2,
    lr_decay_fraction=0.25,
)


def rates(style: str, **changes: float) -> np.ndarray:
    chosen = dataclasses.replace(BASE, lr_decay_style=style, **changes)
    return np.array([learning_rate(i, chosen) for i in range(1, 231)])


def expected(style: str) -> np.ndarray:
    """Every style of BASE again, by interpolation and array arithmetic; warm-up ends at 20."""
    i = np.arange(1, 231, dtype=np.float64)
    p = (i - 20) / 180
    end_of_fall, end_of_plateau = 20 + 80, 20 + 80 + 40
    inverse = 1 / np.sqrt(1 + 10 * np.clip((i - 20) / 80, 0, 1))
    low = 1 / np.sqrt(11)
    anneal = np.geomspace(1e-3, 3e-4, 61)[np.clip(i - end_of_plateau, 0, 60).astype(int)]
    fall = {
        "infinite-cosine": 2e-3 + 1e-3 * np.cos(np.pi * np.clip((i - 20) / 80, 0, 1)),
        "infinite-inv-square-root": 1e-3 + 2e-3 * (inverse - low) / (1 - low),
    }
    tail = np.interp(i, [150, 200], [0.0, 1.0])
    body = {
        "constant": np.full_like(i, 3e-3),
        "linear": np.interp(i, [20, 200], [3e-3, 3e-4]),
        "cosine": 1.65e-3 + 1.35e-3 * np.cos(np.pi * p),
        "inverse-square-root": np.maximum(3e-4, 3e-3 * np.sqrt(20 / i)),
        "warmup-stable-decay": 3e-3 - 2.7e-3 * np.sqrt(tail),
        **{k: np.where(i <= end_of_fall, v, anneal) for k, v in fall.items()},
    }[style]
    body = np.where(i <= 20, 3e-3 * i / 20, body)
    return body if style == "constant" else np.where(i >= 200, 3e-4, body)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_its_closed_form(style: str) -> None:
    np.testing.assert_allclose(rates(style), expected(style), rtol=1e-12)


def test_the_table_holds_every_configured_style() -> None:
    assert set(STYLES) == set(by_key()["optimizer.lr_decay_style"].choices)


@pytest.mark.parametrize(
    ("iteration", "printed"),
    [(1, "9.4372e-09"), (2, "1.88744e-08"), (3, "2.83116e-08"), (4, "3.77488e-08")],
)
def test_warm_up_prints_the_published_rates(iteration: int, printed: str) -> None:
    """LR 3e-4, 635782 steps, warm-up 0.05: 31789.1 steps of warm-up, whose fraction counts."""
    run = OptimizerConfig(learning_rate=3e-4, lr_warmup_fraction=0.05, lr_decay_iters=635782)
    assert f"{learning_rate(iteration, run):.6g}" == printed


@pytest.mark.parametrize("style", ["infinite-cosine", "infinite-inv-square-root"])
def test_infinite_styles_anneal_to_zero_in_a_straight_line(style: str) -> None:
    found = rates(style, min_learning_rate=0.0)
    np.testing.assert_allclose(found[139:200], np.linspace(1e-3, 0, 61), atol=1e-18)
    assert not found[199:].any()


def test_without_warm_up_the_first_rate_is_near_the_highest() -> None:
    assert rates("linear", lr_warmup_fraction=0.0)[0] == pytest.approx(3e-3 - 2.7e-3 / 200)
    assert rates("inverse-square-root", lr_warmup_fraction=0.0)[0] == 3e-3


@pytest.mark.parametrize("style", STYLES)
def test_less_than_a_step_of_warm_up(style: str) -> None:
    found = rates(style, lr_warmup_fraction=0.001)
    assert 0.9 * 3e-3 < found[0] <= 3e-3


@given(
    style=st.sampled_from([*STYLES]),
    decay_iters=st.integers(1, 500),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    cooldown=st.floats(0, 0.3),
    plateau=st.floats(0, 0.2),
    floor=st.sampled_from([0.0, 1e-5, 1e-3]),
)
def test_rates_stay_between_zero_and_the_highest_and_never_rise_after_warm_up(
    style: str,
    decay_iters: int,
    warmup: float,
    decay: float,
    cooldown: float,
    plateau: float,
    floor: float,
) -> None:
    run = OptimizerConfig(
        lr_decay_style=style,
        learning_rate=1e-3,
        min_learning_rate=floor,
        lr_decay_iters=decay_iters,
        lr_warmup_fraction=warmup,
        lr_cooldown_fraction=cooldown,
        lr_constant=1e-3,
        lr_constant_fraction=plateau,
        lr_decay_fraction=decay,
    )
    found = [learning_rate(i, run) for i in range(1, decay_iters + 3)]
    assert all(0 <= rate <= 1e-3 * (1 + 1e-12) for rate in found)
    after = found[int(warmup * decay_iters) :]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(after))
    if style != "constant":
        assert found[-1] == floor


def test_phases_that_fill_the_decay_exactly_are_allowed() -> None:
    run = dataclasses.replace(
        BASE,
        lr_decay_style="infinite-cosine",
        lr_warmup_fraction=0.1,
        lr_cooldown_fraction=0.2,
        lr_constant_fraction=0.7,
    )
    assert learning_rate(199, run) == pytest.approx(1e-3)


def test_steps_count_from_one() -> None:
    with pytest.raises(AssertionError):
        learning_rate(0, BASE)
