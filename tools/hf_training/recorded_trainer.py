"""Hugging Face's Trainer, whose steps, evaluations and saves are written as those of our runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from megatron.checkpoint.state import RunState
from megatron.config.pace import learning_rates
from megatron.config.schema import RunConfig
from megatron.training.device import Device
from megatron.training.loggers import Tracker
from megatron.training.meter import Meter


class Journal(TrainerCallback):
    """Decides what is due, by our settings, and writes its records by our formulas.

    Args:
        run: the configuration.
        device: of this rank.
        tracker: receives every record.
    """

    def __init__(self, run: RunConfig, device: Device, tracker: Tracker) -> None:
        self.run, self.tracker = run, tracker
        self.meter = Meter(run, device)
        self.state = RunState()
        self.rate = learning_rates(run)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What happens after this step."""
        control.should_log = self._due(state, self.run.log.log_interval)
        has_evaluations = self.run.log.eval_interval > 0
        control.should_evaluate = has_evaluations and self._due(state, self.run.log.eval_interval)
        control.should_save = self._due(state, self.run.checkpoint.save_interval)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """The record of the steps since the last one; Hugging Face's loss is their mean."""
        count = state.global_step - self.state.iteration
        if "loss" not in logs or not count:
            return
        samples = self.run.train.global_batch_size
        for _step in range(count):
            self.meter.step(logs["loss"], logs.get("grad_norm"))
            self.state = self.state.after(samples, samples * self.run.model.seq_length)
        self.tracker.log(self.meter.record(self.state, self.rate(self.state.iteration)))

    def event(self, event: str, **values: Any) -> None:
        """A record that is not of a step."""
        about = {
            "iteration": self.state.iteration,
            "train_iters": self.run.train.train_iters,
            "time": time.time(),
            "consumed_tokens": self.state.consumed_tokens,
        }
        self.tracker.log({"event": event, **about, **values})

    def _due(self, state: Any, interval: int) -> bool:
        step = state.global_step
        return step == self.run.train.train_iters or (interval > 0 and step % interval == 0)


class RecordedTrainer(Trainer):
    """Samples in their order, our learning rates, and time of evaluations and saves not in a step.

    Args:
        journal: writes the records.
        arguments: of the Trainer.
    """

    def __init__(self, journal: Journal, **arguments: Any) -> None:
        self.journal = journal
        super().__init__(
            **arguments,
            callbacks=[journal],
            compute_metrics=_accuracy,
            preprocess_logits_for_metrics=_likeliest,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return (
            None if isinstance(data, torch.utils.data.IterableDataset) else SequentialSampler(data)
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Our rate of step i, from SCHEDULES of our settings."""
        base, rate = self.journal.run.optimizer.learning_rate, self.journal.rate
        optimizer = self.optimizer if optimizer is None else optimizer
        factor: Callable[[int], float] = lambda done: rate(done + 1) / base  # noqa: E731
        self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """One evaluation, as an event."""
        with self.journal.meter.off_the_clock():
            began = time.perf_counter()
            found: dict[str, float] = super().evaluate(*arguments, **named)
            loss, samples = float(found["eval_loss"]), int(found["eval_count"])
            seconds = time.perf_counter() - began
            self.journal.event(
                "eval",
                split="validation",
                loss=loss,
                perplexity=math.exp(min(loss, 20.0)),
                accuracy=found["eval_accuracy"],
                samples=samples,
                elapsed_s=seconds,
                samples_per_s=samples / seconds,
            )
        return found

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        with self.journal.meter.off_the_clock():
            began = time.perf_counter()
            super()._save_checkpoint(*arguments, **named)
            folder = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
            self.journal.event("save", path=folder, bytes=_size(folder), **_took(began))


def _took(began: float) -> dict[str, float]:
    seconds = time.perf_counter() - began
    return {"elapsed_s": seconds, "held_s": seconds}


def _size(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _likeliest(logits: Any, labels: Any) -> Any:
    """The predicted tokens: logits of all samples would not fit."""
    del labels
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    """Share of the tokens that were predicted, and the samples; labels stand where they belong."""
    labels = prediction.label_ids
    labels = labels[0] if isinstance(labels, tuple) else labels
    return {"accuracy": float(np.mean(prediction.predictions == labels)), "count": len(labels)}
