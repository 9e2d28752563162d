"""What the Trainer does about a spike: reports it, goes back to a checkpoint, or ends the run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from megatron.checkpoint import store
from megatron.checkpoint.state import RunState
from megatron.config.schema import RunConfig
from megatron.config.skip import merge, ranges_text
from megatron.data.dataset import SampleSource
from megatron.engine import Engine
from megatron.launch.heartbeat import Heartbeat
from megatron.parallel.control import Control
from megatron.training.guard import Guard, Unstable
from megatron.training.log import ALIKE
from megatron.training.meter import Meter
from megatron.training.resume import restore, takes_optimizer
from megatron.training.rollback import rollback_target, suspect_steps
from megatron.training.run_data import Data
from megatron.training.saving import Saves
from megatron.training.stability import Judgement
from megatron.training.suspects import write_suspects

log = logging.getLogger(__name__)

REPORTS_IN_A_ROW = 20  # a run that MAX_BAD_STEPS=0 lets go on writes no more files


class Steps(Protocol):
    """The Trainer as a response sees it: what it reads and, of a rollback, changes."""

    run: RunConfig
    state: RunState
    engine: Engine
    data: Data
    samples: SampleSource
    control: Control
    heartbeat: Heartbeat
    guard: Guard
    meter: Meter
    saves: Saves
    began_after: int

    def log_event(self, event: str, **values: Any) -> None:
        """Logs a record that is not of a step."""


def respond(trainer: Steps, spike: Judgement) -> bool:
    """Acts on a spike whose update was refused, the trainer's last step; a collective.

    Returns:
        Whether the trainer is back at an earlier step.

    Raises:
        Unstable: MAX_ROLLBACKS is used up.
    """
    stability, state = trainer.run.stability, trainer.state
    step, action = state.iteration, "update refused"
    target: store.Checkpoint | None = None
    suspects = suspect_steps(step, stability.rollback_steps)
    used_up = state.rollbacks >= stability.max_rollbacks
    if stability.spike_policy == "rollback":
        found = _found(trainer, suspects, used_up=used_up)
        if isinstance(found, str):
            action = f"update refused, no rollback: {found}"
            # A later rollback neither trains the step again nor takes it for one to undo.
            ranges = merge([*state.skip_ranges, (step, step)])
            trainer.state = replace(state, skip_ranges=ranges)
        elif not used_up:
            target = found
            action = f"rollback to step {found.iteration}, steps {ranges_text((suspects,))} skipped"
    record = spike_record(trainer, step, spike, action)
    if target is not None:
        _roll_back(trainer, target, suspects)
    trainer.log_event("spike", **record)
    if stability.spike_policy == "rollback" and used_up and not isinstance(found, str):
        end_unstable(
            trainer,
            f"step {step} is a spike, and MAX_ROLLBACKS={stability.max_rollbacks} rollbacks have"
            " been made",
        )
    return target is not None


def report(trainer: Steps, step: int, spike: Judgement) -> None:
    """Reports a spike that was found after its update."""
    trainer.log_event("spike", **spike_record(trainer, step, spike, "none (SPIKE_POLICY=warn)"))


def spike_record(trainer: Steps, step: int, spike: Judgement, action: str) -> dict[str, Any]:
    """The values of a spike's record; rank 0 writes the report of its samples."""
    return {
        "iteration": step,
        "loss": spike.loss.value,
        "grad_norm": spike.grad_norm.value,
        "z_loss": spike.loss.z,
        "z_grad_norm": spike.grad_norm.z,
        "median_loss": spike.loss.median,
        "median_grad_norm": spike.grad_norm.median,
        "window": spike.steps,
        "action": action,
        "report": _reported(trainer, step, spike, action),
    }


def end_unstable(trainer: Steps, reason: str) -> NoReturn:
    """Ends the run with status 5, naming where to go on from; a collective.

    Raises:
        Unstable: always.
    """
    trainer.saves.finish()
    root = trainer.run.checkpoint_folder
    changed = trainer.state.iteration - trainer.guard.bad_steps  # the last step that did anything
    steps = trainer.control.first(lambda: [one.iteration for one in store.committed(root)])
    good = next((step for step in steps if step <= changed), None)
    where = (
        f"no checkpoint is as old as step {changed}"
        if good is None
        else f"the last good checkpoint is {store.step_folder(root, good)}"
    )
    if steps[:1] > [changed]:
        where += f"; later ones hold what no step could change: move them out of {root}"
    trainer.log_event("stop", reason=reason)
    trainer.saves.close(at_once=True)
    raise Unstable(
        f"{reason}; {where}. A lower LR, a longer LR_WARMUP_FRAC or a lower CLIP_GRAD steadies a"
        f" run; suspect steps (see {trainer.run.run_folder / 'spikes'}) are left out with"
        " --train-range-to-skip FIRST LAST, or by SPIKE_POLICY=rollback"
    )


def require_finite(trainer: Steps) -> None:
    """Ends the run where a weight or an optimizer state of any rank is not finite; a collective.

    Raises:
        Unstable: one is; nothing is saved. LR_FINDER=1 ends by itself.
    """
    if trainer.run.optimizer.lr_finder:
        return
    (broken,) = trainer.control.maximum([int(not trainer.engine.shards().finite())])
    if broken:
        at = trainer.state.iteration
        end_unstable(trainer, f"weights or optimizer states are not finite after step {at}")


def _reported(trainer: Steps, step: int, spike: Judgement, action: str) -> str | None:
    """The report's path, written by rank 0; no failure of it stops the run."""
    if trainer.control.rank != 0 or trainer.guard.bad_steps > REPORTS_IN_A_ROW:
        return None
    sizes, state = trainer.run.batch_sizes, trainer.state
    since = sizes.consumed(state.iteration) - sizes.consumed(step - 1)
    first, size = state.consumed_samples - since, sizes.of(step)
    try:
        with trainer.meter.off_the_clock():
            path: Path = write_suspects(
                trainer.run.run_folder,
                step,
                spike,
                action,
                range(first, first + size),
                trainer.samples,
                trainer.data.tokenizer.decode,
            )
    except Exception as error:  # files, a tokenizer, a full disk: no report is worth a run
        log.warning(f"no report of the spike at step {step}: {type(error).__name__}: {error}")
        return None
    return str(path)


def _found(trainer: Steps, suspects: tuple[int, int], *, used_up: bool) -> store.Checkpoint | str:
    """The checkpoint to return to, with those after it set aside; or why there is none."""
    root, control = trainer.run.checkpoint_folder, trainer.control
    trainer.saves.finish()
    trainer.heartbeat.enter("load", trainer.state.iteration)  # hashes files, which takes its time
    found = rollback_target(root, trainer.began_after, suspects, trainer.state.skip_ranges, control)
    if isinstance(found, str) or used_up:
        return found
    if not takes_optimizer(trainer.run, found.manifest):
        return f"{found.folder}, before it, has no states of this optimizer to return to"
    try:
        moved = control.first(lambda: store.set_aside_after(root, found.iteration))
    except OSError as error:
        return f"a later checkpoint cannot be set aside ({error})"
    for folder in moved:
        log.warning(f"{folder} is set aside: it was trained on suspect steps", extra=ALIKE)
    return found


def _roll_back(trainer: Steps, target: store.Checkpoint, suspects: tuple[int, int]) -> None:
    """Puts weights, optimizer and counters back, and the suspect steps into the ranges to skip."""
    before = trainer.state
    count = before.rollbacks + 1
    restore(trainer.run, trainer.engine, target)
    trainer.state = replace(
        target.state(),
        data=before.data,
        skip_ranges=merge([*before.skip_ranges, suspects]),
        rollbacks=count,
    )
    trainer.saves.at = target.iteration
    if trainer.data.corpus_losses is not None:
        trainer.data.corpus_losses.take(trainer.engine.device)  # of steps that are undone
    trainer.meter.start()
    trainer.log_event(
        "rollback",
        spike=before.iteration,
        skipped=ranges_text((suspects,)),
        rollbacks=count,
        max_rollbacks=trainer.run.stability.max_rollbacks,
    )
