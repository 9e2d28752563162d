#!/usr/bin/env python3
"""Pretrains a Llama or SmolLM model on the ranks that a launcher has started.

bash train_alcf.sh                                  # makes the configuration, starts the ranks
torchrun --nproc-per-node 2 pretrain_gpt_alcf.py    # the ranks make it themselves, all the same one
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Sequence

from megatron.analysis import finish
from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import RunConfig
from megatron.engine import start_distributed, stop_distributed
from megatron.launch.ranks import Ranks, find_ranks, rendezvous
from megatron.launch.start import prepare_run, read_run
from megatron.parallel.groups import make_groups
from megatron.plan.report import architecture_box
from megatron.training import checkpointing, log
from megatron.training.build import build_engine, build_job
from megatron.training.data import build_data
from megatron.training.device import detect, prepare
from megatron.training.loggers import make_tracker
from megatron.training.loop import train
from megatron.training.stop import StopRequest

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
    except checkpointing.MissingCheckpoint as error:
        return _refused(ranks, error, 4)


def pretrain(run: RunConfig, ranks: Ranks) -> int:
    """One run, from its configuration to its report."""
    log.setup(ranks.rank, "DEBUG" if run.log.debug else run.log.log_level)
    if ranks.rank == 0:
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
    groups = make_groups(run.layout)
    data = build_data(run)
    engine = build_engine(run, groups, device, data.corpus_losses)
    with StopRequest(device.torch_device) as stop:
        state = checkpointing.resume(run, engine, data.record)
        if state.iteration >= run.train.train_iters:
            finish.say_finished(run, state)
            return 0
        leads = ranks.rank == 0
        tracker = make_tracker(
            run,
            run.run_folder,
            logs=leads,
            parameters=run.parameters,
            iteration=state.iteration,
        )
        job = build_job(run, engine, data, device, tracker, state)
        outcome = train(job, state, stop)
    tracker.close()
    if outcome.signal:
        return finish.stopped(run, outcome)
    sample = finish.sample_text(run, engine, data)
    if leads:
        finish.tell(run, run.run_folder, sample)
    engine.close()
    stop_distributed()
    return 0


def _refused(ranks: Ranks, error: Exception, status: int) -> int:
    """All ranks fail alike; one of them says why."""
    if ranks.rank == 0:
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a text may hold what a terminal cannot show
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    status = main(sys.argv[1:])
    logging.shutdown()
    sys.exit(status)
