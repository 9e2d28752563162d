"""The training loop: which steps are taken, skipped, logged, evaluated and saved, in that order."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from megatron.checkpoint import store
from megatron.checkpoint.state import RunState
from megatron.checkpoint.tensors import write_pieces
from megatron.config.schedule import learning_rate
from megatron.config.schema import RunConfig
from megatron.config.skip import is_skipped
from megatron.data.dataset import SampleSource
from megatron.data.loader import Loader, StepPlan, evaluation_loader
from megatron.engine import Engine, MicroBatches, Shards
from megatron.parallel.control import ALONE, Control
from megatron.parallel.piece import Piece
from megatron.training.device import Device
from megatron.training.dump import dump_tokens
from megatron.training.guard import Guard
from megatron.training.loggers import Tracker
from megatron.training.meter import Meter
from megatron.training.optimizers.schedule_free import evaluation_weights
from megatron.training.optimizers.sophia import Curvature, SophiaG
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer
from megatron.training.respond import end_unstable, report, require_finite, respond
from megatron.training.run_data import Data, train_data
from megatron.training.stop import StopRequest

log = logging.getLogger(__name__)

DUMPED_STEPS = 10  # DUMP_TOKENS prints this many


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        state: where the run stands.
        signal: the signal that stopped it, 0 where it finished.
        saved: the state is in a committed checkpoint.
    """

    state: RunState
    signal: int
    saved: bool


def manifest_of(run: RunConfig) -> dict[str, Any]:
    """The run's entries in the manifests of its checkpoints."""
    return {
        "model": run.model.identity(),
        "optimizer": run.optimizer.optimizer,
        "layout": str(run.layout),
        "run": run.to_dict(),
    }


def save_checkpoint(
    folder: Path,
    shards: Shards,
    optimizer: Optimizer,
    state: RunState,
    manifest: Mapping[str, Any],
) -> Path:
    """Commits the weights and optimizer states of all ranks; called by all of them.

    Args:
        folder: of the run's checkpoints.
        shards: what this rank owns.
        optimizer: whose states these are.
        state: of the run.
        manifest: of the run, by `manifest_of`.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: it could not be written; older checkpoints are untouched.
    """
    pieces: Iterable[Piece] = shards.pieces()
    if isinstance(optimizer, WholeMatrixOptimizer):
        pieces = itertools.chain(pieces, optimizer.pieces())
    about = {
        "state": state.to_dict(),
        "counters": shards.counters(),
        "loss_scaler": shards.scaler_state(),
        **manifest,
    }
    return store.save(folder, state.iteration, lambda file: write_pieces(file, pieces), about)


class Trainer:
    """One run on this rank, from the state it is given to its last step.

    All ranks call the same methods in the same order; `state` is replaced by each step.

    Args:
        run: the configuration.
        engine: takes the steps.
        data: what is trained and evaluated on.
        device: of this rank.
        tracker: receives every record.
        stop: records a signal to stop the run.
        state: where the run stands.
        control: all ranks of the run.
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        data: Data,
        device: Device,
        tracker: Tracker,
        stop: StopRequest,
        state: RunState,
        control: Control = ALONE,
    ) -> None:
        self.run, self.engine, self.data = run, engine, data
        self.tracker, self.stop, self.state = tracker, stop, state
        self.control, self.began_after = control, state.iteration
        self.guard = Guard(run.stability, control, scales=run.train.dtype == "fp16")
        pp, dp = engine.groups.pp, engine.groups.dp
        self.plan = StepPlan(
            run.train.global_batch_size,
            run.train.micro_batch_size,
            run.train.gradient_accumulation_steps,
            dp.rank,
            dp.size,
        )
        self.samples = train_data(run, data, state)
        self.reads_data = pp.rank in (0, pp.size - 1)  # stages between see no tokens
        self.meter = Meter(run, device, self._measured)
        self.tokens_per_step = run.tokens_per_step
        self.curvature: Curvature | None = None
        if isinstance(engine.optimizer, SophiaG):
            interval = run.optimizer.sophia_hessian_interval
            self.curvature = Curvature(
                engine, self.plan, interval, run.train.seed, run.model.seq_length
            )
        self._shards = engine.shards()
        self._checkpoints, self._manifest = run.checkpoint_folder, manifest_of(run)

    def train(self) -> Outcome:
        """Runs the steps after the state, until the last one or a signal.

        Returns:
            How it ended; the last state is saved unless saving failed.

        Raises:
            Unstable: not finite, or spiking beyond the policy.
        """
        run = self.run
        saved_at = self.state.iteration
        asked = 0
        with ExitStack() as opened:
            loader = opened.enter_context(self.read_ahead())
            self.meter.start()
            while self.state.iteration < run.train.train_iters and not asked:
                if is_skipped(self.state.iteration + 1, self.state.skip_ranges):
                    self.skip()
                elif self.step(loader):  # back at an earlier step
                    opened.close()
                    loader = opened.enter_context(self.read_ahead())
                    continue
                if self._is_due(run.log.log_interval):
                    self.record()
                    asked = self.stop.all_reduced_signal()
                if self._is_due(run.log.eval_interval):
                    with self.meter.off_the_clock():
                        self.evaluate("validation", self.data.splits.valid)
                if asked or self._is_due(run.checkpoint.save_interval):
                    with self.meter.off_the_clock():
                        saved_at = self.state.iteration if self.save() else saved_at
        if self.state.iteration >= run.train.train_iters:
            self.evaluate("test", self.data.splits.test)
        reason = f"signal {signal.Signals(asked).name}" if asked else "finished"
        self.log_event("stop", reason=reason)
        return Outcome(self.state, asked, saved_at == self.state.iteration)

    def step(self, loader: Loader | None) -> bool:
        """Takes the next step on the next micro-batches of the loader.

        Returns:
            Whether it was a spike after which the run is back at an earlier step.
        """
        iteration = self.state.iteration + 1
        batches = self._micro_batches(loader, iteration)
        if self.run.log.dump_tokens and iteration <= DUMPED_STEPS:
            batches = list(batches)
            with self.meter.off_the_clock():
                dump_tokens(iteration, batches)
        if self.curvature is not None and self.curvature.due(iteration):
            batches = list(batches)
            self.curvature.estimate(self.state, batches)
        self.engine.set_learning_rate(learning_rate(iteration, self.run.optimizer))
        with self.guard.gating(self.engine):
            loss = self.engine.train_batch(batches)
        applied = self.engine.step_applied
        self.meter.step(loss, self.engine.gradient_norm(), self.engine.loss_scale, updated=applied)
        self._advance(skipped=not applied)
        spike = self.guard.stepped(loss, self.engine)
        rolled_back = spike is not None and respond(self, spike)
        if self.guard.is_beyond_policy and not rolled_back:
            count = self.guard.bad_steps
            end_unstable(self, f"{count} steps in a row changed no weight (MAX_BAD_STEPS)")
        return rolled_back

    def skip(self) -> None:
        """Skips the next step, which is in a range to skip: its samples are not read."""
        iteration = self.state.iteration + 1
        with self.meter.off_the_clock():
            log.info(f"iteration {iteration} is in --train-range-to-skip: skipped")
            if self.run.log.dump_skipped_iters:
                to_read = [(iteration, self.state.consumed_samples)]
                with Loader(self.samples, self.plan, to_read) as loader:
                    dump_tokens(iteration, [(batch.tokens, batch.labels) for batch in loader])
        self.meter.skip()
        self._advance(skipped=True)

    def record(self) -> None:
        """Logs the steps since the last record; a collective with corpus losses or a pipeline."""
        losses = self.data.corpus_losses
        corpora = None if losses is None else losses.take(self.engine.device)
        rate = learning_rate(self.state.iteration, self.run.optimizer)
        record = self.meter.record(self.state, rate, corpora)
        self.state = self.state.with_nan(record["nan_iterations"])
        self.tracker.log(record)
        for number, spike in self.guard.recorded(self.meter.last, self.state.iteration):
            report(self, number, spike)
        if record["nan_iterations"]:
            require_finite(self)

    def evaluate(self, split: str, dataset: SampleSource | None) -> None:
        """Logs the mean loss of EVAL_ITERS batches over all ranks; the same samples each time.

        Args:
            split: validation or test.
            dataset: its samples; does nothing where the run has none, or never evaluates.
        """
        run = self.run
        if dataset is None or run.log.eval_interval == 0:
            return
        start = time.perf_counter()
        loader: AbstractContextManager[Loader | None] = nullcontext()
        if self.reads_data:
            loader = evaluation_loader(dataset, self.plan, run.log.eval_iters)
        weights = evaluation_weights(self.engine.optimizer, self.engine.refresh_weights)
        with loader as batches, weights:
            losses = [
                float(self.engine.eval_batch(self._micro_batches(batches, number, marked=False)))
                for number in range(1, run.log.eval_iters + 1)
            ]
        loss = sum(losses) / len(losses)
        perplexity = math.exp(min(loss, 20.0))  # this order keeps a nan
        samples = len(losses) * run.train.global_batch_size
        elapsed = time.perf_counter() - start
        self.log_event(
            "eval",
            split=split,
            loss=loss,
            perplexity=perplexity,
            samples=samples,
            elapsed_s=elapsed,
        )

    def save(self) -> bool:
        """Commits a checkpoint; a failure is logged as an error, and the run continues.

        Returns:
            Whether it is committed.

        Raises:
            Unstable: a weight is not finite.
        """
        require_finite(self)
        start = time.perf_counter()
        try:
            path = save_checkpoint(
                self._checkpoints, self._shards, self.engine.optimizer, self.state, self._manifest
            )
        except store.SaveError as error:
            log.error(f"{error}; the run continues, older checkpoints are intact")
            return False
        size = sum(file.stat().st_size for file in path.iterdir())
        elapsed = time.perf_counter() - start
        self.log_event("save", path=str(path), bytes=size, elapsed_s=elapsed)
        return True

    def read_ahead(self) -> AbstractContextManager[Loader | None]:
        """Opens the micro-batches of all steps to come that are not skipped, read by a thread."""
        if not self.reads_data:
            return nullcontext()
        done, consumed = self.state.iteration, self.state.consumed_samples
        ranges, size = self.state.skip_ranges, self.run.train.global_batch_size
        to_read = (
            (iteration, consumed + (iteration - done - 1) * size)
            for iteration in range(done + 1, self.run.train.train_iters + 1)
            if not is_skipped(iteration, ranges)
        )
        return Loader(self.samples, self.plan, to_read)

    def _micro_batches(
        self, loader: Loader | None, iteration: int, *, marked: bool = True
    ) -> MicroBatches:
        """The (tokens, labels) of one step, which must be the next one of the loader."""
        losses = self.data.corpus_losses if marked else None
        count = self.plan.gradient_accumulation_steps
        for batch in itertools.islice(loader or (), count):
            assert batch.iteration == iteration, f"{batch.iteration=} {iteration=}"
            labels = batch.labels
            yield batch.tokens, labels if losses is None else losses.mark(labels, batch.corpora)

    def _advance(self, *, skipped: bool) -> None:
        samples = self.run.train.global_batch_size
        self.state = self.state.after(samples, self.tokens_per_step, skipped=skipped)

    def _is_due(self, interval: int) -> bool:
        """Whether what happens every `interval` steps (0: never) and at the last happens now."""
        iteration = self.state.iteration
        last = iteration == self.run.train.train_iters
        return last or (interval > 0 and iteration % interval == 0)

    def log_event(self, event: str, **values: Any) -> None:
        """Logs a record that is not of a step."""
        about = {
            "iteration": self.state.iteration,
            "train_iters": self.run.train.train_iters,
            "time": time.time(),
            "consumed_tokens": self.state.consumed_tokens,
        }
        self.tracker.log({"event": event, **about, **values})

    def _measured(self) -> dict[str, float]:
        """The pipeline's bubble since the last record, where there is one; a collective."""
        bubble = self.engine.pipeline_bubble()
        return {} if bubble is None else {"pipeline_bubble": bubble}
