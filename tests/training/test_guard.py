"""What is counted, what is refused, and that ranks which see other numbers decide alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from megatron.config.schema import StabilityConfig
from megatron.parallel.control import ALONE, Control, make_control
from megatron.training.guard import Guard
from tests.spawn import run


class Engine:
    """Takes steps of given loss and norm; refuses, as DeepSpeed, a norm that is not finite."""

    def __init__(self) -> None:
        self.step_applied, self.loss_scale = True, 1.0
        self._gate: Callable[[float, float], bool] | None = None

    @contextmanager
    def gated(self, gate: Callable[[float, float], bool]) -> Iterator[None]:
        self._gate = gate
        yield
        self._gate = None

    def take(self, loss: float, norm: float) -> None:
        finite = math.isfinite(norm)
        self.step_applied = finite and (self._gate is None or self._gate(loss, norm))


def guard(control: Control = ALONE, scales: bool = False, **settings: Any) -> Guard:
    return Guard(StabilityConfig(spike_window=16, **settings), control, scales=scales)


def step(guard: Guard, engine: Any, loss: float, norm: float = 1.0) -> Any:
    with guard.gating(engine):
        engine.take(loss, norm)
    return guard.stepped(loss, engine)


def different_numbers() -> list[tuple[bool, bool, bool]]:
    """(applied, spike, finite) of three steps; only rank 1 sees what is wrong with two of them."""
    engine, own = Engine(), guard(make_control(), spike_policy="skip")
    for _ in range(16):
        assert step(own, engine, 2.0) is None
    found = []
    odd = dist.get_rank() == 1
    for loss in (9.0 if odd else 2.0, math.nan if odd else 2.0, 2.0):
        spike = step(own, engine, loss)
        found.append((engine.step_applied, spike is not None, own.bad_steps > 0))
    return found


def test_one_rank_that_finds_a_spike_decides_for_all() -> None:
    expected = [(False, True, True), (False, True, True), (True, False, False)]
    assert run(different_numbers, 3) == [expected] * 3


@pytest.mark.parametrize("policy", ["off", "warn", "skip", "rollback"])
def test_steps_in_a_row_that_changed_nothing_end_the_run(policy: str) -> None:
    engine, own = Engine(), guard(spike_policy=policy, max_bad_steps=3)
    for norms, beyond in (([math.inf] * 2, False), ([1.0], False), ([math.nan] * 3, True)):
        for norm in norms:
            step(own, engine, 2.0, norm)
        assert own.is_beyond_policy is beyond
    assert not guard(max_bad_steps=0).is_beyond_policy


def test_a_refusal_is_a_bad_step() -> None:
    engine, own = Engine(), guard(spike_policy="skip", max_bad_steps=2)
    for loss in [2.0] * 16 + [50.0, 50.0]:
        assert not own.is_beyond_policy
        step(own, engine, loss)
    assert own.is_beyond_policy and not engine.step_applied


@pytest.mark.parametrize("policy", ["off", "warn", "skip", "rollback"])
def test_the_search_of_the_loss_scaler_is_no_bad_step(policy: str) -> None:
    """From 2^16 to 1 in halves: more steps than the limit; at 1 it has ended."""
    engine, own = Engine(), guard(scales=True, spike_policy=policy, max_bad_steps=3)
    for power in range(16, 0, -1):
        engine.loss_scale = 2.0**power
        assert step(own, engine, 2.0, math.inf) is None
        assert own.bad_steps == 0
    engine.loss_scale = 1.0
    for count in (1, 2, 3):
        step(own, engine, 2.0, math.inf)
        assert own.bad_steps == count
    assert own.is_beyond_policy


def test_a_record_is_judged_step_by_step() -> None:
    own = guard()
    assert own.recorded([(2.0, 1.0)] * 16, 16) == []
    steps = [(2.0, 1.0), None, (9.0, 1.0), (2.0, math.nan), (2.0, 1.0)]
    assert [number for number, _ in own.recorded(steps, 21)] == [19, 20]
    assert guard(spike_policy="off").recorded([(math.nan, 1.0)], 1) == []
    assert guard(spike_policy="skip").recorded([(math.nan, 1.0)], 1) == []
    scaled = guard(scales=True)
    assert scaled.recorded([(2.0, math.inf), (math.nan, math.inf)], 2)[0][0] == 2
    assert len(scaled.recorded([(2.0, math.inf)], 3)) == 0
