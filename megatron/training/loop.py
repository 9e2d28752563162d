"""The loop: which steps are taken, skipped, logged, evaluated and saved, in that order."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron.checkpoint.state import RunState
from megatron.checkpoint.store import SaveError
from megatron.config.schedule import learning_rate
from megatron.config.schema import OptimizerConfig
from megatron.config.skip import is_skipped
from megatron.engine import Engine, MicroBatches
from megatron.training.dump import dump_tokens
from megatron.training.loggers import Tracker
from megatron.training.metrics import Meter, Record
from megatron.training.optimizers.curvature import Curvature
from megatron.training.optimizers.schedule_free import evaluation_weights
from megatron.training.stop import StopRequest

log = logging.getLogger(__name__)

DUMPED_STEPS = 10  # DUMP_TOKENS prints this many


class Steps(Protocol):
    """The micro-batches of each step of a run, read ahead."""

    def step(self, iteration: int) -> MicroBatches:
        """Those of one step; steps come in order, skipped ones are never asked for."""


@dataclass(frozen=True)
class Intervals:
    """When things happen, in steps; 0 is never.

    Attributes:
        train_iters: the last step.
        log, evaluate, save: every so many steps.
        skip_ranges: steps not to train on, inclusive.
        dump_tokens: print the tokens of the first steps.
        dump_skipped: read and print the tokens of skipped steps.
    """

    train_iters: int
    log: int
    evaluate: int
    save: int
    skip_ranges: tuple[tuple[int, int], ...] = ()
    dump_tokens: bool = False
    dump_skipped: bool = False


@dataclass(frozen=True)
class Job:
    """What the loop works with.

    Attributes:
        engine: takes the steps.
        intervals: when things happen.
        schedule: the learning rate.
        steps: opens the read-ahead of the steps after a state.
        peek: micro-batches of any step, read at once; for printing what is skipped.
        evaluations: split name -> batches of an evaluation, each a step's micro-batches.
        save: commits a checkpoint, returns its folder and bytes.
        meter, tracker: what the run tells.
        samples_per_step, tokens_per_step: what a step consumes.
        curvature: for an optimizer that wants a second gradient now and then.
        corpus_loss: loss of each corpus since the last call; a collective of all ranks.
    """

    engine: Engine
    intervals: Intervals
    schedule: OptimizerConfig
    steps: Callable[[RunState], AbstractContextManager[Steps]]
    peek: Callable[[RunState], MicroBatches]
    evaluations: dict[str, Callable[[], Iterator[MicroBatches]]]
    save: Callable[[RunState], tuple[Path, int]]
    meter: Meter
    tracker: Tracker
    samples_per_step: int
    tokens_per_step: int
    curvature: Curvature | None = None
    corpus_loss: Callable[[], dict[str, float]] | None = None


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        state: where it stands.
        signal: the signal that stopped it, 0 where it finished.
        saved: the state is in a committed checkpoint.
    """

    state: RunState
    signal: int
    saved: bool


def train(job: Job, state: RunState, stop: StopRequest) -> Outcome:
    """Runs the steps after `state`; called by all ranks.

    Returns:
        How it ended; the last state is saved unless saving failed.
    """
    intervals = job.intervals
    last = intervals.train_iters
    saved_at = state.iteration
    asked = 0
    with job.steps(state) as steps:
        job.meter.start()
        while state.iteration < last and not asked:
            state = _one_step(job, steps, state)
            if _due(state, intervals.log, last):
                corpora = job.corpus_loss() if job.corpus_loss else None
                rate = learning_rate(state.iteration, job.schedule)
                record = job.meter.record(state, rate, corpora)
                state = state.with_nan(record["nan_iterations"])
                job.tracker.log(record)
                asked = stop.agreed()
            if _due(state, intervals.evaluate, last):
                with job.meter.off_the_clock():
                    evaluate(job, "validation", state)
            if asked or _due(state, intervals.save, last):
                with job.meter.off_the_clock():
                    saved_at = _save(job, state) or saved_at
    if state.iteration >= intervals.train_iters:
        evaluate(job, "test", state)
    reason = f"signal {signal.Signals(asked).name}" if asked else "finished"
    job.tracker.log(_event(job, state, "stop", reason=reason))
    return Outcome(state, asked, saved_at == state.iteration)


def evaluate(job: Job, split: str, state: RunState) -> float | None:
    """Mean loss of a split over all ranks, logged; None where the run has no such split."""
    if split not in job.evaluations:
        return None
    start = time.perf_counter()
    with evaluation_weights(job.engine.optimizer, job.engine.refresh_weights):
        losses = [float(job.engine.eval_batch(batch)) for batch in job.evaluations[split]()]
    loss = sum(losses) / len(losses)
    job.tracker.log(
        _event(
            job,
            state,
            "eval",
            split=split,
            loss=loss,
            perplexity=math.exp(min(loss, 20.0)),  # this order keeps a nan
            samples=len(losses) * job.samples_per_step,
            elapsed_s=time.perf_counter() - start,
        )
    )
    return loss


def _one_step(job: Job, steps: Steps, state: RunState) -> RunState:
    """Takes or skips the step after `state`."""
    iteration = state.iteration + 1
    engine, intervals = job.engine, job.intervals
    if is_skipped(iteration, intervals.skip_ranges):
        with job.meter.off_the_clock():
            log.info(f"iteration {iteration} is in --train-range-to-skip: skipped")
            if intervals.dump_skipped:
                dump_tokens(iteration, job.peek(state))
        job.meter.skip()
        return state.after(job.samples_per_step, job.tokens_per_step, skipped=True)
    batches = steps.step(iteration)
    if intervals.dump_tokens and iteration <= DUMPED_STEPS:
        batches = list(batches)
        with job.meter.off_the_clock():
            dump_tokens(iteration, batches)
    if job.curvature is not None and job.curvature.due(iteration):
        batches = list(batches)
        job.curvature.estimate(state, batches)
    engine.set_learning_rate(learning_rate(iteration, job.schedule))
    loss: Tensor = engine.train_batch(batches)
    job.meter.step(loss, engine.gradient_norm(), engine.loss_scale, updated=engine.step_applied)
    return state.after(job.samples_per_step, job.tokens_per_step, skipped=not engine.step_applied)


def _save(job: Job, state: RunState) -> int | None:
    """Commits a checkpoint; a failure is loud, and the run goes on."""
    start = time.perf_counter()
    try:
        path, size = job.save(state)
    except SaveError as error:
        log.error(f"{error}; the run goes on, older checkpoints are intact")
        return None
    elapsed = time.perf_counter() - start
    job.tracker.log(_event(job, state, "save", path=str(path), bytes=size, elapsed_s=elapsed))
    return state.iteration


def _event(job: Job, state: RunState, event: str, **values: Any) -> Record:
    return {
        "event": event,
        "iteration": state.iteration,
        "train_iters": job.intervals.train_iters,
        "time": time.time(),
        "consumed_tokens": state.consumed_tokens,
        **values,
    }


def _due(state: RunState, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps, and at the last one, happens now."""
    return state.iteration == last or (interval > 0 and state.iteration % interval == 0)
