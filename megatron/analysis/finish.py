"""The end of a run: a text from the model, a summary, and what to do next."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from megatron.analysis.recorded_run import RecordedRun, read_folder
from megatron.analysis.report_page import REPORT, write_page
from megatron.analysis.run_report import loss_plot, write_report
from megatron.checkpoint.state import RunState
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.engine import Engine
from megatron.parallel.control import Control
from megatron.training.run_data import Data
from megatron.training.sample import sample_text
from megatron.training.stop import cause_text
from megatron.training.trainer import Outcome

log = logging.getLogger(__name__)

NOT_SAVED = 6
"""Exit status of a run that ended without its last state on disk."""

_GIVE_UP_S = 600.0
"""Seconds after which a rank that hangs in the sample is ended."""


def report(
    run: RunConfig,
    engine: Engine,
    data: Data,
    control: Control,
    status: int = 0,
    tick: Callable[[], None] = lambda: None,
    *,
    limit_s: float = _GIVE_UP_S,
    end: Callable[[int], object] = os._exit,
) -> None:
    """Samples, and prints the summary; called by all ranks of a run that is saved and done.

    What goes wrong here is a warning: it takes nothing from the run.

    Args:
        run: the configuration.
        engine: the trained model.
        data: of the run.
        control: messages between all ranks.
        status: the run's exit status.
        tick: called after each token of the sample.
        limit_s: seconds until a sample counts as hung. Nothing can call a rank back from a
            collective whose others have failed, so the process ends there, with `status`.
        end: ends the process.
    """

    def give_up() -> None:
        if control.rank == 0:
            log.warning(f"no sample: it has not ended after {limit_s:.0f} s (the run is complete)")
            print_summary(run, "")
        sys.stdout.flush()
        sys.stderr.flush()
        end(status)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    sampled = sample_text(run, engine, data, control, tick, "the run is complete")
    timer.cancel()
    if control.rank == 0:
        print_summary(run, "[...]".join(sampled or ()))


def print_summary(run: RunConfig, sample: str) -> None:
    """Prints plot, sample and next commands, and writes the report; for the rank that logs.

    A full disk, or metrics that cannot be read, are warnings: the run is complete.
    """
    try:
        _print_summary(run, sample)
    except Exception as error:
        log.warning(f"no summary: {type(error).__name__}: {error} (the run is complete)")


def _print_summary(run: RunConfig, sample: str) -> None:
    folder = run.run_folder
    try:
        # The launcher says how wide its terminal is (COLUMNS): a rank writes into a pipe.
        width = max(30, shutil.get_terminal_size().columns)
        recorded = read_folder(folder)
        print(loss_plot(recorded.records, width, sys.stdout.encoding or "utf-8"))
        if sample:
            print(f"Sample from the model (generated after [...]):\n\n{sample}\n")
        report = write_report(recorded, folder)
        print("\n".join(_next_steps(run, folder, _draw(recorded, folder) or report)))
    except Exception as error:  # a full disk, or a terminal that has gone
        log.warning(f"no summary: {type(error).__name__}: {error} (the run is complete)")


def _draw(recorded: RecordedRun, folder: Path) -> Path | None:
    """Writes report.html and the pictures in plots/; None where that failed."""
    path = folder / REPORT
    try:
        write_page([recorded], path, folder / "plots")
    except ConfigError as error:  # matplotlib is not installed
        log.info(str(error))
    except Exception as error:
        log.warning(f"no pictures: {type(error).__name__}: {error} (the run is complete)")
    else:
        return path
    return None


def _next_steps(run: RunConfig, folder: Path, report: Path) -> list[str]:
    more = f"TRAIN_ITERS={2 * run.train.train_iters}"
    if run.data.order == "megatron":  # an order of TRAIN_ITERS x GLOBAL_BATCH samples
        more += " ALLOW_DATA_CHANGE=1"
    return [
        f"report        {report}",
        f"metrics       {folder / 'metrics.jsonl'}",
        f"plot again    python3 tools/plot.py {folder}",
        f"resume        {more} bash train_alcf.sh --resume {shlex.quote(str(folder))}",
        f"more text     python3 tools/generate.py {folder} --prompt TEXT",
        f"Hugging Face  python3 tools/convert_hf.py export {folder} OUT",
    ]


def log_finished(run: RunConfig, state: RunState) -> None:
    """Log that a run has already done all its steps."""
    log.info(
        f"{run.run_folder} has done its {state.iteration} steps (TRAIN_ITERS="
        f"{run.train.train_iters}). To continue it: TRAIN_ITERS=N bash train_alcf.sh --resume "
        f"{shlex.quote(str(run.run_folder))}, with N above that; to start again choose another "
        "RUN_NAME"
    )


def print_end(outcome: Outcome) -> None:
    """The last thing said: what is not on disk, or what stopped the run; for the rank that logs."""
    if outcome.error:
        known = outcome.saved_at >= 0
        newest = f"is step {outcome.saved_at}" if known else "does not exist"
        print(f"error: {outcome.error}; the newest checkpoint {newest}", file=sys.stderr)
    elif outcome.cause:
        log.info(
            f"{cause_text(outcome.cause)}: saved step {outcome.state.iteration} and exits; "
            "the same command resumes from there"
        )
