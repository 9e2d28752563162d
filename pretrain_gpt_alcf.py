#!/usr/bin/env python3
"""Pretrains a Llama or SmolLM model on the ranks that a launcher has started.

bash train_alcf.sh                                  # makes the configuration, starts the ranks
torchrun --nproc-per-node 2 pretrain_gpt_alcf.py    # every rank makes the same configuration
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

from megatron.analysis import finish
from megatron.config.deepspeed import deepspeed_config
from megatron.config.errors import ConfigError, DataError
from megatron.config.pipeline_stages import stage_bounds
from megatron.config.schema import RunConfig, read_run
from megatron.engine import Engine, make_engine, start_distributed, stop_distributed
from megatron.launch.ranks import Ranks, find_ranks, rendezvous
from megatron.launch.start import prepare_run
from megatron.parallel.control import make_control
from megatron.parallel.groups import Groups, make_groups
from megatron.plan.report import architecture_box
from megatron.training import log
from megatron.training.build import loss_function, model_layers
from megatron.training.corpus_loss import CorpusLosses
from megatron.training.device import Device, detect, prepare
from megatron.training.guard import Unstable
from megatron.training.loggers import make_tracker
from megatron.training.optimizers.rules import make_optimizer
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer
from megatron.training.resume import MissingCheckpoint, resume
from megatron.training.run_data import Data, build_data
from megatron.training.stop import StopRequest
from megatron.training.trainer import Trainer

COLLECTIVE_TIMEOUT_S = 1800.0


def main(argv: Sequence[str]) -> int:
    """Trains; returns the exit status documented in the README."""
    ranks = find_ranks(os.environ)
    try:
        run = read_run(argv[1]) if argv[:1] == ["--config"] else prepare_run(os.environ, argv)
        return pretrain(run, ranks)
    except ConfigError as error:
        return _refused(ranks, error, 2)
    except DataError as error:
        return _refused(ranks, error, 3)
    except MissingCheckpoint as error:
        return _refused(ranks, error, 4)


def pretrain(run: RunConfig, ranks: Ranks) -> int:
    """One run, from its configuration to its report."""
    log.setup(ranks.rank, "DEBUG" if run.log.debug else run.log.log_level)
    leads = ranks.rank == 0
    if leads:
        print(architecture_box(run))
    device = detect(ranks.local_rank, run.train.dtype)
    prepare(device, run.train.dtype)
    start_distributed(
        device.backend,
        ranks.rank,
        ranks.world_size,
        ranks.local_rank,
        rendezvous(os.environ),
        COLLECTIVE_TIMEOUT_S,
    )
    groups = make_groups(run.layout, timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    data = build_data(run)
    engine = build_engine(run, groups, device, data.corpus_losses)
    status = train(run, engine, data, device, leads=leads)
    engine.close()
    stop_distributed()
    return status


def train(run: RunConfig, engine: Engine, data: Data, device: Device, *, leads: bool) -> int:
    """Resumes, trains to the last step or a signal, and reports; `leads` on the rank that logs."""
    with StopRequest(device.torch_device) as stop:
        state = resume(run, engine, data.record)
        if state.iteration >= run.train.train_iters:
            finish.log_finished(run, state)
            return 0
        tracker = make_tracker(run, logs=leads, iteration=state.iteration)
        trainer = Trainer(run, engine, data, device, tracker, stop, state, make_control())
        try:
            outcome = trainer.train()
        except Unstable as error:
            if leads:
                print(f"error: {error}", file=sys.stderr)
            return 5
        finally:
            tracker.close()
    if outcome.signal:
        return finish.stopped(outcome)
    sample = finish.sample_text(run, engine, data)
    if leads:
        finish.print_summary(run, sample)
    return 0


def build_engine(
    run: RunConfig, groups: Groups, device: Device, corpus_losses: CorpusLosses | None = None
) -> Engine:
    """Model, optimizer and DeepSpeed for this rank; its loss counts into `corpus_losses`."""
    kept = run.train.checkpoint_num_layers
    engine = make_engine(
        model_layers(run, groups.tp, groups.sp),
        loss_function(run, groups.tp, corpus_losses),
        partial(make_optimizer, run.optimizer),
        groups,
        device.torch_device,
        deepspeed_config(run),
        stage_bounds=stage_bounds(run.stage_blocks),
        compile={"0": False, "1": True, "auto": device.kind != "cpu"}[run.train.compile],
        recompute_num_layers=kept if run.train.activation_checkpointing == "1" and kept > 1 else 0,
        mics_shard_size=run.parallel.mics_shard_size,
        pipeline_schedule=run.parallel.pipeline_schedule,
    )
    if isinstance(engine.optimizer, WholeMatrixOptimizer):
        engine.optimizer.bind(
            engine.module.named_parameters(),
            groups.dp_sp,
            groups.tp,
            engine.shards().spans(),
            run.model.vocab_size,
        )
    return engine


def _refused(ranks: Ranks, error: Exception, status: int) -> int:
    """All ranks fail with the same error; one of them prints it."""
    if ranks.rank == 0:
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    status = main(sys.argv[1:])
    logging.shutdown()
    sys.exit(status)
