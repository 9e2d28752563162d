"""What is measured on a slow cable: one rank's training step under each way to share gradients.

Every arm trains the same layers. Their arithmetic is tiny and an accelerator's time is slept in its
place, block by block, so that the cores are free for the communication as a host's are, and neither
the number of cores nor their load decides how much of it is hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from megatron.config import deepspeed as deepspeed_file
from megatron.config.resolve import Site, resolve
from megatron.config.schema import RunConfig
from megatron.engine import buckets, reduction
from megatron.model.block import Block
from megatron.model.stack import Stack
from megatron.parallel.groups import Groups, make_groups
from megatron.training.build import model_layers
from megatron.training.device import detect
from pretrain_gpt_alcf import build_engine


class Step(NamedTuple):
    """A rank's training step.

    Attributes:
        run: takes it.
        finish: waits for what it has left to the next one.
    """

    run: Callable[[], None]
    finish: Callable[[], Any] = lambda: None


FORWARD_S = 0.005  # slept in a block's forward; its backward takes twice that
SMALL = 16  # buckets are divided by it: the model is small, and all of it would be one bucket
DDP_BUCKET_MB = 25  # torch's default

VARIABLES = {
    "NLAYERS": "8",
    "HIDDEN": "192",
    "HEADS": "4",
    "NUM_KV_HEAD": "4",
    "FFN_HIDDEN_SIZE": "512",
    "SEQ": "16",
    "VOCAB_SIZE": "512",
    "TOKENIZER_TYPE": "NullTokenizer",
    "DRY_RUN": "1",
    "MICRO_BATCH": "1",
    "GLOBAL_BATCH": "",
    "CLIP_GRAD": "1.0",
    "ENGINE": "auto",
}


class Arm(NamedTuple):
    """One way to train.

    Attributes:
        make: from the configuration and this rank's groups to a step.
        variables: of its configuration.
        zero: of DeepSpeed's `zero_optimization`, over what ships.
    """

    make: Callable[[RunConfig, Groups], Step]
    variables: Mapping[str, str]
    zero: Mapping[str, Any] = {}


def run_config(arm: Arm, world_size: int) -> RunConfig:
    """The configuration of an arm."""
    variables = {**VARIABLES, "WORLD_SIZE": str(world_size), **arm.variables}
    return resolve(variables, [], Site()).run


def prepared(arm: Arm, world_size: int) -> Step:
    """This rank's step; the process group is up. A collective of all ranks."""
    buckets.LARGEST //= SMALL
    reduction.IN_FLIGHT //= SMALL
    shipped = deepspeed_file._zero
    deepspeed_file._zero = lambda run: shipped(run) | dict(arm.zero)
    run = run_config(arm, world_size)
    return arm.make(run, make_groups(run.layout))


def ours(run: RunConfig, groups: Groups) -> Step:
    """The engine that ships."""
    engine = build_engine(run, groups, detect(dist.get_rank(), run.train.dtype))
    _sleeping(engine.module)

    def step() -> None:
        tokens = [_sample(run) for _ in range(run.train.gradient_accumulation_steps)]
        engine.train_batch(iter(tokens))

    return Step(step, engine.shards)  # it waits for the weights that are gathered


def ddp(run: RunConfig, groups: Groups) -> Step:
    """torch's DistributedDataParallel; with bf16 weights, AdamW updates copies in fp32."""
    module = _model(run)
    weights = list(module.parameters())
    wrapped = DistributedDataParallel(
        module, bucket_cap_mb=DDP_BUCKET_MB / SMALL, gradient_as_bucket_view=True, static_graph=True
    )
    masters = [p.detach().float().clone() if p.dtype != torch.float32 else p for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)

    def update() -> None:
        for weight, master in zip(weights, masters, strict=True):
            if master is not weight:
                assert weight.grad is not None
                master.grad = weight.grad.float()
        nn.utils.clip_grad_norm_(masters, run.optimizer.clip_grad)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                if master is not weight:
                    weight.copy_(master)

    return _plain(run, groups, wrapped, update, wrapped.no_sync)


def fsdp2(run: RunConfig, groups: Groups) -> Step:
    """torch's FSDP2 that keeps what it has gathered until the backward: ZeRO 2."""
    module = _model(run).float()
    kind = torch.bfloat16 if run.train.dtype == "bf16" else None
    reduced = kind if run.train.grad_reduce_in_bf16 else None if kind is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=reduced)
    for child in module.children():
        if not isinstance(child, nn.ModuleDict):
            fully_shard(child, mp_policy=policy, reshard_after_forward=False)
    fully_shard(module, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), run.optimizer.clip_grad)
        optimizer.step()

    return _plain(run, groups, module, update, None)


def _plain(
    run: RunConfig,
    groups: Groups,
    module: nn.Module,
    update: Callable[[], None],
    no_sync: Callable[[], Any] | None,
) -> Step:
    """A plain loop: forward and backward of all micro-batches, then the update."""
    count = run.train.gradient_accumulation_steps

    def one() -> None:
        tokens, labels = _sample(run)
        (module(tokens, labels) / count).backward()

    def step() -> None:
        for number in range(count):
            if no_sync is not None and number < count - 1:
                with no_sync():
                    one()
            else:
                one()
        update()
        module.zero_grad()

    return Step(step)


def _model(run: RunConfig) -> nn.Module:
    module = Stack(model_layers(run), 0)
    _sleeping(module)
    return module.bfloat16() if run.train.dtype == "bf16" else module


def _sleeping(module: nn.Module) -> None:
    """Blocks take an accelerator's time."""
    for block in module.modules():
        if isinstance(block, Block):
            block.register_forward_pre_hook(partial(_sleep, FORWARD_S))
            block.register_full_backward_pre_hook(partial(_sleep, 2 * FORWARD_S))


def _sleep(seconds: float, *_: Any) -> None:
    time.sleep(seconds)


def _sample(run: RunConfig) -> tuple[Tensor, Tensor]:
    shape = (run.train.micro_batch_size, run.model.seq_length)
    tokens = torch.randint(0, run.model.vocab_size, shape)
    return tokens, tokens.roll(-1, 1)
