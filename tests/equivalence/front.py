"""A run made from variables, as a user does: for tests of what is built from a RunConfig."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.state import RunState
from megatron.config.resolve import Site, resolve
from megatron.config.schema import RunConfig
from megatron.engine import Engine, start_distributed
from megatron.parallel.groups import Groups, make_groups
from megatron.training import checkpointing
from megatron.training.build import build_engine
from megatron.training.device import detect
from megatron.training.optimizers.schedule_free import evaluation_weights

VARIABLES = {
    "NLAYERS": "4",
    "HIDDEN": "64",
    "HEADS": "8",
    "NUM_KV_HEAD": "4",
    "FFN_HIDDEN_SIZE": "96",
    "SEQ": "32",
    "VOCAB_SIZE": "200",
    "TOKENIZER_TYPE": "NullTokenizer",
    "DRY_RUN": "1",  # no data is read: the samples come from below
    "GLOBAL_BATCH": "8",
    "MICRO_BATCH": "2",
    "DTYPE": "fp32",
    "OPT": "sgd",
    "LR": "0.1",
    "CLIP_GRAD": "0.3",
}


def run_config(variables: Mapping[str, str]) -> RunConfig:
    """The configuration of a tiny run with some variables set."""
    return resolve({**VARIABLES, **variables}, [], Site()).run


def world(variables: Mapping[str, str]) -> int:
    """Ranks of such a run."""
    return run_config(variables).parallel.world_size


def build(run: RunConfig) -> Engine:
    """The engine of this rank."""
    rank = dist.get_rank()
    start_distributed("gloo", rank, dist.get_world_size(), rank, "", 60)
    return build_engine(run, make_groups(run.layout), detect(rank, run.train.dtype))


def samples(run: RunConfig, step: int) -> Tensor:
    """(GBS, S + 1) tokens of a step, equal on all ranks."""
    generator = torch.Generator().manual_seed(500 + step)
    shape = (run.train.global_batch_size, run.model.seq_length + 1)
    return torch.randint(0, run.model.vocab_size, shape, generator=generator)


def micro_batches(run: RunConfig, groups: Groups, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a step."""
    size, dp = run.train.micro_batch_size, groups.dp
    for number in range(run.train.gradient_accumulation_steps):
        start = (number * dp.size + dp.rank) * size
        part = samples(run, step)[start : start + size]
        yield part[:, :-1], part[:, 1:]


def steps(run: RunConfig, engine: Engine, first: int, last: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps first .. last - 1 at the highest rate."""
    curve = []
    for step in range(first, last):
        engine.set_learning_rate(run.optimizer.learning_rate)
        loss = engine.train_batch(micro_batches(run, engine.groups, step))
        curve.append((float(loss), float(engine.gradient_norm())))
    return curve


def train_and_save(variables: Mapping[str, str], count: int) -> tuple[list, Tensor | None]:
    """Trains `count` steps and saves; returns the curve and the logits of a fixed input."""
    run = run_config(variables)
    engine = build(run)
    curve = steps(run, engine, 0, count)
    checkpointing.save(run, engine, RunState(iteration=count))
    with evaluation_weights(engine.optimizer, engine.refresh_weights):
        return curve, engine.logits(probe(run))


def resume_and_train(variables: Mapping[str, str], count: int) -> list[tuple[float, float]]:
    """Takes back the newest checkpoint and trains `count` steps."""
    run = run_config(variables)
    engine = build(run)
    state = checkpointing.resume(run, engine)
    return steps(run, engine, state.iteration, state.iteration + count)


def probe(run: RunConfig) -> Tensor:
    """(2, S) tokens."""
    return samples(run, 99)[:2, :-1]
