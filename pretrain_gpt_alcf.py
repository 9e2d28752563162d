#!/usr/bin/env python3
"""Pretrains a Llama or SmolLM model on the ranks that a launcher has started.

bash train_alcf.sh                                  # makes the configuration, starts the ranks
torchrun --nproc-per-node 2 pretrain_gpt_alcf.py    # every rank makes the same configuration
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take seconds
    # Ctrl-C ends a rank that has nothing to save, in silence; a local launcher has held it back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    from megatron.launch.rank_process import begin
    from megatron.launch.versions import exit_unless_fit

    signals = begin(sys.argv[1:], os.environ)
    exit_unless_fit()

import faulthandler
import io
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron.analysis import finish
from megatron.analysis.lr_finder import LrFinder, require_start
from megatron.config.deepspeed import deepspeed_config
from megatron.config.errors import ConfigError, DataError, MissingCheckpoint
from megatron.config.pipeline_stages import stage_bounds
from megatron.config.schema import RunConfig
from megatron.display.marked_line import LIVE
from megatron.engine import Engine, make_engine, start_distributed, stop_distributed
from megatron.launch.accelerators import promise
from megatron.launch.heartbeat import HEARTBEAT, Heartbeat
from megatron.launch.rank_process import run_to_end
from megatron.launch.ranks import Ranks, find_ranks, rendezvous
from megatron.launch.start import configuration
from megatron.launch.starts import accept
from megatron.launch.walltime import job_end
from megatron.model.document_mask import Documents
from megatron.parallel.control import ALONE, Control, make_control
from megatron.parallel.groups import Groups, make_groups
from megatron.parallel.meeting import MeetingError
from megatron.plan.report import architecture_box
from megatron.training import log
from megatron.training.attention_kernel import chosen
from megatron.training.build import (
    block_input,
    documents_followed,
    loss_targets,
    model_layers,
)
from megatron.training.compiler import compile_now, compiles
from megatron.training.corpus_loss import CorpusLosses
from megatron.training.device import Device, detect, prepare
from megatron.training.float8 import with_float8
from megatron.training.garbage import at_chosen_steps
from megatron.training.guard import Unstable
from megatron.training.loggers import make_tracker
from megatron.training.optimizers.rules import make_optimizer
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer
from megatron.training.profiles import profiled, require_profiler
from megatron.training.resume import Source, find_source, resume
from megatron.training.run_data import Data, build_data, train_data
from megatron.training.start_up import StartUp
from megatron.training.stop import STOP_FILE, StopRequest
from megatron.training.trainer import Trainer


def main(argv: Sequence[str], signals: Sequence[int] = ()) -> int:
    """Trains; returns the exit status documented in the README.

    Args:
        argv: the command line without the program's name.
        signals: that came, or come, before training listens.
    """
    ranks = find_ranks(os.environ)
    try:
        with configuration(os.environ, argv) as (run, config):
            return pretrain(run, ranks, config, signals)
    except (ConfigError, DataError, MissingCheckpoint, MeetingError) as error:
        print_error(ranks, error)
        return error.exit_status


def pretrain(
    run: RunConfig, ranks: Ranks, config: Path | None = None, signals: Sequence[int] = ()
) -> int:
    """One run, from its configuration to its report; `config` is the file that holds it."""
    started = time.time()
    level = "DEBUG" if run.log.debug else run.log.log_level
    live, every = bool(os.environ.get(LIVE)), run.log.log_from_all_ranks
    log.setup(ranks.rank, level, marks=live, all_ranks=every)
    leads, start_up = ranks.rank == 0, StartUp()
    require_profiler(run)
    if leads:
        print(architecture_box(run))
    heartbeat = Heartbeat(os.environ.get(HEARTBEAT, ""), ranks.rank)
    heartbeat.enter("start")
    device = detect(ranks.local_rank, run.train.dtype, run.launch.device, promise(os.environ))
    prepare(device, run.train.dtype)
    start_distributed(
        device.backend,
        ranks.rank,
        ranks.world_size,
        device.index,
        rendezvous(os.environ),
        60 * run.launch.distributed_timeout_minutes,
        name=f"{run.run_folder} {ranks.counted}",
    )
    groups, control = make_groups(run.layout), make_control()
    start_up.took("ranks")
    heartbeat.enter("data")
    data = build_data(run, control, heartbeat)
    start_up.took("data")
    documents = documents_followed(run, data.tokenizer.eod)
    heartbeat.enter("load")  # hashes files, which takes its time
    source = find_source(run, control)
    heartbeat.enter("build")
    engine = build_engine(
        run,
        groups,
        device,
        data.corpus_losses,
        documents,
        control,
        draw=not source.has_weights,
    )
    start_up.took("model")
    # To the very end: what comes after the last save must not turn a saved run into a failed one.
    with stop_request(run, started, signals, leads=leads) as stop:
        status = train(
            run, engine, data, device, stop, control, heartbeat, source, config, start_up
        )
        engine.close()
        stop_distributed()
    heartbeat.close()
    return status


def train(
    run: RunConfig,
    engine: Engine,
    data: Data,
    device: Device,
    stop: StopRequest,
    control: Control,
    heartbeat: Heartbeat,
    source: Source,
    config: Path | None = None,
    start_up: StartUp | None = None,
) -> int:
    """Resumes, trains to the last step or until it is asked to stop, and reports.

    Once nothing can refuse it, the start of the file `config`, where there is one, is accepted.
    """
    leads, start_up = control.rank == 0, start_up or StartUp()
    heartbeat.enter("load")
    state = resume(run, engine, data.record, control, source, heartbeat)
    start_up.took("checkpoint")
    require_start(run, state)
    if state.iteration >= run.train.train_iters:
        finish.log_finished(run, state)
        return 0
    train_data(run, data, state)  # refuses a list that is too short
    if leads and config:
        accept(config, run.run_folder)
    tracker = make_tracker(run, logs=leads, iteration=state.iteration)
    finder = LrFinder(tracker, stop) if run.optimizer.lr_finder else None
    tracker = finder or tracker
    trainer = Trainer(run, engine, data, device, tracker, stop, state, control, heartbeat)
    start_up.took("trackers")
    start_up.log()
    try:
        with at_chosen_steps(), profiled(trainer):
            outcome = trainer.train()
    except Unstable as error:
        if leads:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        tracker.close()
    if outcome.cause == STOP_FILE:
        stop.remove_file()
    if finder:
        if leads:
            finder.report(run)
        return 0
    heartbeat.enter("sample")
    status = finish.NOT_SAVED if outcome.error else 0
    if not outcome.cause:
        finish.report(run, engine, data, control, status, heartbeat.tick)
    if leads:
        finish.print_end(outcome)
    return status


def stop_request(
    run: RunConfig, started: float, signals: Sequence[int], *, leads: bool
) -> StopRequest:
    """What stops this rank; one rank looks at the clock and at the run's folder for all."""
    if not leads:
        return StopRequest(signals=signals)
    minutes = run.train.exit_duration_mins
    return StopRequest(
        run.run_folder / "STOP",
        stop_at=None if minutes is None else started + 60 * minutes,
        job_end=job_end(os.environ),
        signals=signals,
    )


def build_engine(
    run: RunConfig,
    groups: Groups,
    device: Device,
    corpus_losses: CorpusLosses | None = None,
    documents: Documents | None = None,
    control: Control = ALONE,
    *,
    draw: bool = True,
) -> Engine:
    """Model, optimizer and DeepSpeed for this rank.

    Its loss counts into `corpus_losses`; its masks and positions follow `documents`. Without `draw`
    its weights are what memory holds, until `resume` loads them.
    """
    kept = run.train.checkpoint_num_layers
    attention = chosen(run, device.torch_device)
    layers = model_layers(run, groups.tp, groups.sp, attention, draw=draw)
    compiled = compiles(run, device.kind, os.environ, control)
    engine = make_engine(
        with_float8(run, layers, device.torch_device),
        loss_targets(run, groups.tp, corpus_losses, documents),
        partial(make_optimizer, run.optimizer),
        groups,
        device.torch_device,
        deepspeed_config(run),
        stage_bounds=stage_bounds(run.stage_blocks),
        sharded=run.sharded,
        compiled_shape=block_input(run) if compiled else None,
        recompute_num_layers=kept if run.train.activation_checkpointing == "1" and kept > 1 else 0,
        mics_shard_size=run.parallel.mics_shard_size,
        pipeline_schedule=run.parallel.pipeline_schedule,
        documents=documents,
    )
    compile_now(run, engine, documents)
    if isinstance(engine.optimizer, WholeMatrixOptimizer):
        engine.optimizer.bind(
            engine.module.named_parameters(),
            groups.dp_sp,
            groups.tp,
            engine.shards().spans(),
            run.model.vocab_size,
        )
    return engine


def print_error(ranks: Ranks, error: Exception) -> None:
    """Every rank prints its error: it may be the only one that has it. The launcher folds them."""
    text = f"error: {error}"
    if ranks.world_size > 1:
        text = "\n".join(f"[rank {ranks.rank}] error: {line}" for line in str(error).splitlines())
    print(text, file=sys.stderr)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # lines arrive whole, whatever ranks write beside us
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(errors="backslashreplace", line_buffering=True, write_through=False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    status = run_to_end(partial(main, sys.argv[1:], signals), os.environ)
    logging.shutdown()
    sys.exit(status)
