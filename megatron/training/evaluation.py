"""Looks at a model in training: mean loss and accuracy of the same samples, a sampled text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.checkpoint.state import RunState
from megatron.config.schema import RunConfig
from megatron.data.dataset import SampleSource
from megatron.data.loader import HOST, Loader, StepPlan
from megatron.engine import Engine, MicroBatches
from megatron.launch.heartbeat import Heartbeat
from megatron.parallel.control import Control
from megatron.training.accuracy import Accuracy, perplexity
from megatron.training.optimizers.schedule_free import evaluation_weights
from megatron.training.run_data import Data
from megatron.training.sample import sample_text


class Evaluated(Protocol):
    """The Trainer as an evaluation sees it."""

    run: RunConfig
    data: Data
    state: RunState
    engine: Engine
    control: Control
    heartbeat: Heartbeat
    full_plan: StepPlan
    reads_data: bool
    validation_loss: tuple[int, float | None]

    def agree(self) -> int:
        """What asks any rank to stop, 0 for nothing; a collective."""

    def is_due(self, interval: int) -> bool:
        """Whether what happens every `interval` steps (0: never) and at the last happens now."""

    def micro_batches(
        self, loader: Loader | None, iteration: int, *, marked: bool = True
    ) -> MicroBatches:
        """The (tokens, labels) of one batch."""

    def log_event(self, event: str, **values: Any) -> None:
        """Logs a record that is not of a step."""


def look(trainer: Evaluated) -> int:
    """The evaluation and the sampled text that are due after a step; a collective.

    Returns:
        What asked to stop meanwhile, 0 for nothing.
    """
    log, evaluates = trainer.run.log, trainer.is_due(trainer.run.log.eval_interval)
    cause = evaluate(trainer, "validation", trainer.data.splits.valid) if evaluates else 0
    wanted = trainer.is_due(log.sample_interval) if log.sample_interval else log.sample_prompt
    if cause or not wanted or not (evaluates or log.sample_interval):
        return cause
    trainer.heartbeat.enter("sample", trainer.state.iteration)
    start, tick = time.perf_counter(), trainer.heartbeat.tick
    sampled = sample_text(trainer.run, trainer.engine, trainer.data, trainer.control, tick)
    if sampled is not None:
        prompt, text = sampled
        seconds = time.perf_counter() - start
        trainer.log_event("sample", prompt=prompt, text=text, elapsed_s=seconds)
    return 0


def evaluate(trainer: Evaluated, split: str, dataset: SampleSource | None) -> int:
    """Logs mean loss and accuracy of EVAL_ITERS batches over all ranks; a collective.

    The losses stay on the device until the last batch: no batch waits for it.

    Args:
        trainer: whose model, and where its validation loss is kept.
        split: validation or test.
        dataset: its samples; does nothing where the run has none, or never evaluates.

    Returns:
        What asked to stop meanwhile, 0 for nothing; the evaluation then ends without a record.
    """
    run, engine = trainer.run, trainer.engine
    if dataset is None or run.log.eval_interval == 0:
        return 0
    ticks = run.log.eval_iters * trainer.full_plan.gradient_accumulation_steps
    trainer.heartbeat.enter("evaluate", trainer.state.iteration, ticks)
    start = time.perf_counter()
    loader: AbstractContextManager[Loader | None] = nullcontext()
    if trainer.reads_data:
        loader = evaluation_loader(dataset, trainer.full_plan, run.log.eval_iters, engine.device)
    weights = evaluation_weights(engine.optimizer, engine.refresh_weights)
    losses: list[Tensor] = []
    accuracy = Accuracy(engine.groups.tp, run.model.vocab_size)
    with loader as batches, weights, _counting(engine, accuracy):
        for number in range(1, run.log.eval_iters + 1):
            micro_batches = trainer.micro_batches(batches, number, marked=False)
            losses.append(engine.eval_batch(micro_batches))
            if cause := trainer.agree():
                return cause
    loss = sum(torch.stack(losses).flatten().tolist()) / len(losses)
    if split == "validation":
        trainer.validation_loss = trainer.state.iteration, loss
    share = accuracy.share(trainer.control)
    samples, seconds = len(losses) * run.train.global_batch_size, time.perf_counter() - start
    trainer.log_event(
        "eval",
        split=split,
        loss=loss,
        perplexity=perplexity(loss),
        accuracy=share,
        samples=samples,
        elapsed_s=seconds,
        samples_per_s=samples / seconds,
    )
    return 0


@contextmanager
def _counting(engine: Engine, accuracy: Accuracy) -> Iterator[None]:
    """Inside, the losses of this rank's part of the model also count for the accuracy."""
    module: Any = engine.module  # a Stack, or a pipeline's Stages
    before = module.targets
    module.targets = accuracy.counted(before)
    try:
        yield
    finally:
        module.targets = before


def evaluation_loader(
    dataset: SampleSource, plan: StepPlan, eval_iters: int, device: torch.device = HOST
) -> Loader:
    """Loader of one evaluation: always samples [0, eval_iters x GBS), to be comparable."""
    steps = [(j + 1, j * plan.global_batch_size) for j in range(eval_iters)]
    return Loader(dataset, plan, steps, device=device)
