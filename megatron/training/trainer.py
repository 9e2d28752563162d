"""The training loop: which steps are taken, skipped, logged, evaluated and saved, in that order."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from megatron.checkpoint.saver import Saved
from megatron.checkpoint.state import RunState
from megatron.config.pace import learning_rates
from megatron.config.schema import RunConfig
from megatron.config.skip import is_skipped
from megatron.data.loader import Loader
from megatron.engine import Engine, MicroBatches
from megatron.launch.heartbeat import Heartbeat
from megatron.parallel.control import ALONE, Control
from megatron.training import garbage
from megatron.training.device import Device
from megatron.training.dump import dump_tokens
from megatron.training.evaluation import evaluate, look
from megatron.training.growing_batch import step_plans
from megatron.training.guard import Guard
from megatron.training.loggers import Tracker
from megatron.training.meter import Meter
from megatron.training.optimizers.sophia import Curvature, SophiaG
from megatron.training.probes import Probes
from megatron.training.respond import end_unstable, report, require_finite, respond
from megatron.training.run_data import Data, train_data
from megatron.training.saving import Saves
from megatron.training.step_changes import step_changes
from megatron.training.stop import INTERVAL, StopRequest, cause_text

log = logging.getLogger(__name__)

DUMPED_STEPS = 10  # DUMP_TOKENS prints this many


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        state: where the run stands.
        cause: what stopped it (`stop.cause_text`), 0 where it finished.
        saved_at: step of the newest checkpoint that this start committed or resumed from.
        error: why the last state is not in a checkpoint; empty where it is.
    """

    state: RunState
    cause: int
    saved_at: int
    error: str


class Trainer:
    """One run on this rank, from the state it is given to its last step.

    All ranks call the same methods in the same order; `state` is replaced by each step.

    Args:
        run: the configuration.
        engine: takes the steps.
        data: what is trained and evaluated on.
        device: of this rank.
        tracker: receives every record.
        stop: knows what asks this rank to stop.
        state: where the run stands.
        control: messages between all ranks.
        heartbeat: tells the launcher what this rank does.
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
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.run, self.engine, self.data = run, engine, data
        self.tracker, self.stop, self.state = tracker, stop, state
        self.control, self.heartbeat = control, heartbeat or Heartbeat()
        self.began_after = state.iteration
        self.guard = Guard(run.stability, control, scales=run.train.dtype == "fp16")
        pp, dp = engine.groups.pp, engine.groups.dp
        self.full_plan, self.plan = step_plans(run, dp)
        self.rate, self.probes = learning_rates(run), Probes(run, engine, self.control)
        self.changes = step_changes(run, engine, self.plan, self.probes)
        self.samples = train_data(run, data, state)
        # Stages between see no tokens, but which document each belongs to follows from them.
        self.reads_data = pp.rank in (0, pp.size - 1) or run.data.follows_documents
        self.meter = Meter(run, device, self._measured)
        self.curvature: Curvature | None = None
        if isinstance(engine.optimizer, SophiaG):
            numbers = run.optimizer.sophia_hessian_interval, run.train.seed, run.model.seq_length
            self.curvature = Curvature(engine, self.plan, *numbers)
        self.saves = Saves(run, engine, control, self.heartbeat, state.iteration, self._saved)
        self.validation_loss: tuple[int, float | None] = (-1, None)

    def train(self) -> Outcome:
        """Runs the steps after the state, until the last one or until something asks it to stop.

        Returns:
            How it ended; the last state is saved unless saving failed.

        Raises:
            Unstable: not finite, or spiking beyond the policy.
        """
        run = self.run
        cause = 0
        with ExitStack() as opened:
            loader = opened.enter_context(self.read_ahead())
            self.meter.start()
            while self.state.iteration < run.train.train_iters and not cause:
                self.stop.step_begins()
                if is_skipped(self.state.iteration + 1, self.state.skip_ranges):
                    self.skip()
                elif self.step(loader):  # back at an earlier step
                    opened.close()
                    loader = opened.enter_context(self.read_ahead())
                    continue
                if self.is_due(run.log.log_interval):
                    self.record()
                self.stop.step_took()
                garbage.step_ended(self.state.iteration)
                cause = self.agree() or self._exit_interval()
                if not cause and self.is_due(run.log.look_interval):
                    with self.meter.off_the_clock():
                        cause = look(self)
                if cause or self.is_due(run.checkpoint.save_interval):
                    with self.meter.off_the_clock():
                        self.save()
                        garbage.saved()
                        cause = cause or self.agree()
        if self.state.iteration >= run.train.train_iters:
            cause = cause or evaluate(self, "test", self.data.splits.test)
        self.saves.finish()
        self.log_event("stop", reason=cause_text(cause) if cause else "finished")
        self.saves.close(at_once=cause != 0)
        error = "" if self.saves.at == self.state.iteration else self.saves.error
        return Outcome(self.state, cause, self.saves.at, error)

    def agree(self) -> int:
        """What asks any rank to stop, 0 for nothing; a collective.

        A save behind the steps is carried on as soon as all ranks have written.
        """
        cause, pending = self.control.maximum([self.stop.cause(), int(self.saves.pending)])
        if self.saves.in_flight and not pending:
            self.saves.carry_on()
        return cause

    def step(self, loader: Loader | None) -> bool:
        """Takes the next step on the next micro-batches of the loader.

        Returns:
            Whether it was a spike after which the run is back at an earlier step.
        """
        iteration = self.state.iteration + 1
        self.heartbeat.enter("step", iteration)
        batches = self.micro_batches(loader, iteration)
        if self.run.log.dump_tokens and iteration <= DUMPED_STEPS:
            batches = list(batches)
            with self.meter.off_the_clock():
                dump_tokens(iteration, batches)
        for change in self.changes:
            change(iteration)
        if self.curvature is not None and self.curvature.due(iteration):
            batches = list(batches)
            self.curvature.estimate(self.state, batches)
        self.engine.set_learning_rate(self.rate(iteration))
        with self.guard.gating(self.engine):
            loss = self.engine.train_batch(batches)
        self.meter.step(loss, self.engine.gradient_norm(), self.engine.loss_scale)
        self._advance(skipped=False)
        spike = self.guard.stepped(loss, self.engine)
        self._count_refused()
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
        self.guard.settle()
        self._count_refused()
        losses = self.data.corpus_losses
        corpora = None if losses is None else losses.take(self.engine.device)
        record = self.meter.record(self.state, self.rate(self.state.iteration), corpora)
        self.state = self.state.with_nan(record["nan_iterations"])
        self.tracker.log(record)
        for number, spike in self.guard.recorded(self.meter.last, self.state.iteration):
            report(self, number, spike)
        if record["nan_iterations"]:
            require_finite(self)

    def save(self) -> None:
        """Commits a checkpoint, at once or behind the steps to come; a collective.

        Raises:
            Unstable: a weight is not finite.
        """
        self.guard.settle()
        self._count_refused()
        require_finite(self)
        iteration, loss = self.validation_loss
        self.saves.save(self.state, loss if iteration == self.state.iteration else None)

    def read_ahead(self) -> AbstractContextManager[Loader | None]:
        """Opens the micro-batches of all steps to come that are not skipped, read by a thread."""
        if not self.reads_data:
            return nullcontext()
        steps = self._to_read(self.state)
        return Loader(self.samples, self.plan, steps, device=self.engine.device)

    def _to_read(self, state: RunState) -> Iterator[tuple[int, int]]:
        """(step, samples consumed before it) of the steps to come."""
        consumed = state.consumed_samples
        for iteration in range(state.iteration + 1, self.run.train.train_iters + 1):
            if not is_skipped(iteration, state.skip_ranges):
                yield iteration, consumed
            consumed += self.plan.at(iteration).global_batch_size

    def micro_batches(
        self, loader: Loader | None, iteration: int, *, marked: bool = True
    ) -> MicroBatches:
        """The (tokens, labels) of one step, which must be the next one of the loader."""
        losses = self.data.corpus_losses if marked else None
        plan = self.plan.at(iteration) if marked else self.full_plan
        for batch in itertools.islice(loader or (), plan.gradient_accumulation_steps):
            assert batch.iteration == iteration, f"{batch.iteration=} {iteration=}"
            self.heartbeat.tick()
            labels = batch.labels
            yield batch.tokens, labels if losses is None else losses.mark(labels, batch.corpora)

    def _advance(self, *, skipped: bool) -> None:
        samples = self.plan.at(self.state.iteration + 1).global_batch_size
        self.state = self.state.after(samples, samples * self.run.model.seq_length, skipped=skipped)

    def _count_refused(self) -> None:
        """Counts the steps that the guard has found to have changed no weight."""
        refused, self.guard.refused = self.guard.refused, 0
        self.meter.refused(refused)
        self.state = self.state.with_skipped(refused)

    def is_due(self, interval: int) -> bool:
        """Whether what happens every `interval` steps (0: never) and at the last happens now."""
        iteration = self.state.iteration
        last = iteration == self.run.train.train_iters
        return last or (interval > 0 and iteration % interval == 0)

    def _exit_interval(self) -> int:
        interval = self.run.train.exit_interval
        return INTERVAL if interval and self.state.iteration % interval == 0 else 0

    def _saved(self, saved: Saved) -> None:
        self.stop.save_took(saved.elapsed_s)
        costs = {name: getattr(saved, name) for name in ("bytes", "elapsed_s", "held_s")}
        self.log_event("save", iteration=saved.iteration, path=str(saved.path), **costs)

    def log_event(self, event: str, **values: Any) -> None:
        """Logs a record that is not of a step."""
        at = {"iteration": self.state.iteration, "train_iters": self.run.train.train_iters}
        now = {"time": time.time(), "consumed_tokens": self.state.consumed_tokens}
        self.tracker.log({"event": event, **at, **now, **values})

    def _measured(self) -> dict[str, Any]:
        """What the probes see, and a pipeline's bubble since the last record; a collective."""
        bubble = self.engine.pipeline_bubble()
        return self.probes.measured() | ({} if bubble is None else {"pipeline_bubble": bubble})
