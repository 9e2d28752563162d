"""Seconds of a step's phases: what is slowed down on purpose is found in its phase alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.engine import clock
from megatron.engine.interface import MicroBatches
from megatron.engine.phases import PHASES, Phases
from megatron.parallel.control import make_control
from megatron.training.phase_times import across_ranks
from tests.equivalence import front
from tests.spawn import run

LAYOUTS = {
    "one": {},
    "dp2-sharded": {"WORLD_SIZE": "2"},
    "dp2-zero3": {"WORLD_SIZE": "2", "ZERO_STAGE": "3"},
    "pp2": {"PP": "2"},
}
LONG = {
    "dp2-zero2": {"WORLD_SIZE": "2", "ZERO_STAGE": "2"},
    "tp2": {"TP": "2"},
    "sp2": {"SP": "2"},
    "dp2-deepspeed": {"WORLD_SIZE": "2", "ENGINE": "deepspeed"},
    "host": {"WORLD_SIZE": "2", "CPU_OPTIMIZER": "1"},
    "pp2-documents": {"PP": "2", "EOD_MASK_LOSS": "1"},
    "dualpipev": {"PP": "2", "PIPELINE_SCHEDULE": "dualpipev", "GLOBAL_BATCH": "16"},
}
REDUCED = ("dp2-sharded", "pp2", "dp2-zero2", "sp2", "pp2-documents", "dualpipev")
"""Where gradients are sent in a phase of its own; DeepSpeed's one stage hides that in others."""

TAKES = {"forward": 0.04, "backward": 0.06, "data": 0.08, "optimizer": 0.3}
"""Seconds on the last rank (DualPipeV: the first, which has the loss), per micro-batch; the
optimizer's once a step. Its clock is the test's own, so they are exact."""


class Clock:
    """Stands still but for what a test lets pass, and a microsecond at each reading."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


CLOCK = Clock()


class Slow(torch.autograd.Function):
    """Takes its time in both passes."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        CLOCK.now += TAKES["forward"]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        CLOCK.now += TAKES["backward"]
        return gradient


def slow_batches(batches: MicroBatches) -> Iterator[Any]:
    for batch in batches:
        CLOCK.now += TAKES["data"]
        yield batch


def once(passed: list[float]) -> None:
    """DeepSpeed calls the rule once for each of its groups."""
    CLOCK.now += 0 if passed else TAKES["optimizer"]
    passed.append(TAKES["optimizer"])


def timed(variables: Mapping[str, str], slow: bool) -> tuple[dict[str, Any], list[float], int]:
    """Phases of the second and third step over all ranks, losses, and micro-batches of a step."""
    clock.time = CLOCK  # type: ignore[assignment]
    config, control = front.run_config(variables), make_control()
    engine = front.build(config)
    phases = Phases(engine) if slow else None
    passed: list[float] = []
    reads = 0 if "PIPELINE_SCHEDULE" in variables else dist.get_world_size() - 1
    last = slow and dist.get_rank() == reads
    if last:
        norm = next(one for name, one in engine.module.named_modules() if name.endswith("norm"))
        norm.register_forward_hook(lambda module, given, output: Slow.apply(output))
        engine.optimizer.register_step_pre_hook(lambda *_: once(passed))
    losses = []
    for step in range(3):
        if phases is not None and step == 1:
            phases.seconds()
        passed.clear()
        engine.set_learning_rate(config.optimizer.learning_rate)
        batches = front.micro_batches(config, engine.groups, step)
        losses.append(float(engine.train_batch(slow_batches(batches) if last else batches)))
    spans = 0 if phases is None else len(phases._waiting[-1].spans)
    batches = front.micro_batches(config, engine.groups, 0)
    engine.eval_batch(batches)
    if phases is not None:
        assert len(phases._waiting[-1].spans) == spans  # an evaluation is in no phase
    found = {} if phases is None else across_ranks(phases, control)
    if phases is not None:
        assert across_ranks(phases, control) == {}
    return found, losses, config.train.gradient_accumulation_steps


def compare(layout: str) -> None:
    variables = {**LAYOUTS, **LONG}[layout]
    ranks = front.world(variables)
    results = run(timed, ranks, variables, True)
    assert results[0] == results[-1]  # on all ranks
    found, losses, count = results[0]
    assert losses == run(timed, ranks, variables, False)[0][1]
    most, least = found["timers_max"], found["timers_min"]
    assert list(most) == list(least) == [name for name in PHASES if name in most]
    assert ("gradient-reduction" in most) == (layout in REDUCED)
    wanted = {name: count * seconds for name, seconds in TAKES.items()} | {
        "optimizer": TAKES["optimizer"],
        "forward-backward": count * (TAKES["forward"] + TAKES["backward"] + TAKES["data"]),
    }
    most.pop("gradient-reduction", None)
    assert most == pytest.approx(wanted, abs=1e-3)
    for name, seconds in least.items():
        assert 0 <= seconds < 1e-3 if ranks > 1 else seconds == most.get(name, seconds)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str) -> None:
    compare(layout)


@pytest.mark.long
@pytest.mark.parametrize("layout", LONG)
def test_layout_long(layout: str) -> None:
    compare(layout)
