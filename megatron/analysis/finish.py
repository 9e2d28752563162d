"""The end of a run: a text from the model, a summary, and what to do next."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

from megatron.analysis.plot import plot, series
from megatron.analysis.run_report import write_report
from megatron.checkpoint.state import RunState
from megatron.config.schema import RunConfig
from megatron.engine import Engine
from megatron.training.generate import generate
from megatron.training.metrics_file import read
from megatron.training.optimizers.schedule_free import evaluation_weights
from megatron.training.run_data import Data
from megatron.training.stop import cause_text
from megatron.training.trainer import Outcome

log = logging.getLogger(__name__)

NOT_SAVED = 6
"""Exit status of a run that ended without its last state on disk."""

_PROMPT_TOKENS = 24
_NEW_TOKENS = 64


def sample_text(run: RunConfig, engine: Engine, data: Data) -> str:
    """A continuation of the start of a validation sample; a collective over all ranks."""
    split = data.splits.valid or data.splits.train
    assert split is not None
    length = min(_PROMPT_TOKENS, run.model.seq_length)
    prompt = split.sample(0).tokens[:length].tolist()
    with evaluation_weights(engine.optimizer, engine.refresh_weights):
        added = generate(
            engine,
            prompt,
            _NEW_TOKENS,
            vocab_size=min(run.model.vocab_size, data.tokenizer.vocab_size),
            context=run.model.seq_length,
            stop_at=data.tokenizer.eod,
        )
    given, grown = data.tokenizer.decode(prompt), data.tokenizer.decode(prompt + added)
    return f"{given}[...]{grown.removeprefix(given)}"


def print_summary(run: RunConfig, sample: str) -> None:
    """Prints plot, sample and next commands, and writes the report; for the rank that logs."""
    folder = run.run_folder
    curve = series(read(folder / "metrics.jsonl"))
    print(plot({"loss": curve}, "loss", encoding=sys.stdout.encoding or "utf-8"))
    print(f"Sample from the model (generated after [...]):\n\n{sample}\n")
    report = write_report(folder)
    print("\n".join(_next_steps(run, folder, report)))


def _next_steps(run: RunConfig, folder: Path, report: Path) -> list[str]:
    more = f"TRAIN_ITERS={2 * run.train.train_iters}"
    if run.data.order == "megatron":  # an order of TRAIN_ITERS x GLOBAL_BATCH samples
        more += " ALLOW_DATA_CHANGE=1"
    return [
        f"report        {report}",
        f"metrics       {folder / 'metrics.jsonl'}",
        f"plot again    python3 tools/plot.py {folder}",
        f"resume        {more} bash train_alcf.sh --resume {shlex.quote(str(folder))}",
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


def status(outcome: Outcome, *, leads: bool) -> int:
    """The exit status of a run that has ended; what is not on disk is the last thing said."""
    iteration = outcome.state.iteration
    if outcome.error:
        if leads:
            known = outcome.saved_at >= 0
            newest = f"is step {outcome.saved_at}" if known else "does not exist"
            print(f"error: {outcome.error}; the newest checkpoint {newest}", file=sys.stderr)
        return NOT_SAVED
    if outcome.cause:
        log.info(
            f"{cause_text(outcome.cause)}: saved step {iteration} and exits; "
            "the same command resumes from there"
        )
    return 0
