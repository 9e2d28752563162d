"""A tiny run made from variables, as a user does, and trained on every rank of a layout.

What is built is what ships: the configuration, DeepSpeed's dictionary and the engine. Every layout
sees the same samples and starts from the same weights, so its losses and gradient norms can be
compared with those of one process. SGD shows a wrong gradient scale that Adam would hide; the clip
binds at every step, so a wrong norm changes the losses too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.retention import KEEP_ALL
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.state import RunState
from megatron.config import deepspeed as deepspeed_file
from megatron.config.resolve import Site, resolve
from megatron.config.schema import RunConfig
from megatron.engine import Engine, start_distributed
from megatron.parallel.control import Control, make_control
from megatron.parallel.groups import Groups, make_groups
from megatron.training.build import documents_followed
from megatron.training.device import detect
from megatron.training.optimizers.schedule_free import evaluation_weights
from megatron.training.resume import Source, find_source, resume
from megatron.training.saving import manifest_of, save_checkpoint
from pretrain_gpt_alcf import build_engine

VARIABLES = {
    "NLAYERS": "4",
    "HIDDEN": "64",
    "HEADS": "8",
    "NUM_KV_HEAD": "4",
    "FFN_HIDDEN_SIZE": "96",
    "SEQ": "32",
    "VOCAB_SIZE": "200",  # not a multiple of 128: the padding is at work, and differs with TP
    "TOKENIZER_TYPE": "NullTokenizer",
    "DRY_RUN": "1",  # no data is read: the samples come from below
    "GLOBAL_BATCH": "8",
    "MICRO_BATCH": "2",
    "DTYPE": "fp32",
    "OPT": "sgd",
    "LR": "0.1",
    "CLIP_GRAD": "0.3",
}
NOTHING_STAYS_WHOLE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""ZeRO-3 keeps whole what is small or soon used again: in a tiny model, else, everything."""

Curve = list[tuple[float, float]]  # (loss, gradient norm) of each step


def run_config(variables: Mapping[str, str]) -> RunConfig:
    """The configuration of a tiny run with some variables set."""
    return resolve({**VARIABLES, **variables}, [], Site()).run


def world(variables: Mapping[str, str]) -> int:
    """Ranks of such a run."""
    return run_config(variables).parallel.world_size


def build(
    run: RunConfig,
    large: bool = False,
    eod: int = -1,
    source: Source | None = None,
    poisoned: bool = True,
) -> Engine:
    """The engine of this rank.

    Args:
        run: the configuration.
        large: ZeRO-3 is at work as it is in a large model.
        eod: id that ends a document, where the run follows documents.
        source: where its weights will come from.
        poisoned: until they come, they are not numbers.
    """
    if large and run.parallel.zero_stage == 3:
        _shard_everything()
    rank = dist.get_rank()
    start_distributed("gloo", rank, dist.get_world_size(), 0, "", 60)
    device, documents = detect(rank, run.train.dtype), documents_followed(run, eod)
    groups, draw = make_groups(run.layout), source is None or not source.has_weights
    with filled_with_nan() if poisoned and not draw else nullcontext():
        return build_engine(run, groups, device, documents=documents, draw=draw)


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """torch fills the memory that it gives. (A graph holds for one setting of this switch.)"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _shard_everything() -> None:
    """Layers NOTHING_STAYS_WHOLE on the shipped configuration, in this process."""
    shipped = deepspeed_file._zero

    def zero(run: RunConfig) -> dict[str, Any]:
        return shipped(run) | NOTHING_STAYS_WHOLE

    deepspeed_file._zero = zero


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


def steps(run: RunConfig, engine: Engine, first: int, last: int) -> Curve:
    """Steps first .. last - 1 at the highest rate."""
    curve = []
    for step in range(first, last):
        engine.set_learning_rate(run.optimizer.learning_rate)
        loss = engine.train_batch(micro_batches(run, engine.groups, step))
        curve.append((float(loss), float(engine.gradient_norm())))
    return curve


def train(variables: Mapping[str, str], count: int, large: bool = False) -> Curve:
    """Trains `count` steps from the start."""
    run = run_config(variables)
    return steps(run, build(run, large), 0, count)


def train_and_save(
    variables: Mapping[str, str], count: int, large: bool = False
) -> tuple[Curve, Tensor | None]:
    """Trains `count` steps and saves; returns the curve and the logits of a fixed input."""
    run, control = run_config(variables), make_control()
    engine = build(run, large)
    curve = steps(run, engine, 0, count)
    save(run, engine, count, control)
    with evaluation_weights(engine.optimizer, engine.refresh_weights):
        return curve, engine.logits(probe(run))


def save(run: RunConfig, engine: Engine, count: int, control: Control) -> None:
    """Commits a checkpoint after `count` steps."""
    state = RunState(iteration=count)
    saver = Saver(run.checkpoint_folder, control, KEEP_ALL, asynchronous=False, warn=print)
    saved = save_checkpoint(saver, engine.shards(), engine.optimizer, state, manifest_of(run))
    assert saved is not None and saved.path is not None, saved


def resume_and_train(variables: Mapping[str, str], count: int, large: bool = False) -> Curve:
    """Takes back the newest checkpoint and trains `count` steps."""
    run, control = run_config(variables), make_control()
    source = find_source(run, control)
    engine = build(run, large, source=source)
    state = resume(run, engine, None, control, source)
    return steps(run, engine, state.iteration, state.iteration + count)


def probe(run: RunConfig) -> Tensor:
    """(2, S) tokens."""
    return samples(run, 99)[:2, :-1]
