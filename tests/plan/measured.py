"""Bytes that the program's own model and loss keep, counted from tensors on this host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from megatron.config.schema import RunConfig
from megatron.parallel import head_loss as file
from megatron.parallel.groups import SERIAL
from megatron.parallel.head_loss import Targets
from megatron.training.attention_kernel import chosen
from megatron.training.build import model_layers
from tests.plan.engine_peak import Held

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def blocks_of(run: RunConfig) -> list[nn.Module]:
    """The run's blocks, on one rank."""
    layers = model_layers(run, attention=chosen(run, torch.device("cpu")))
    return [layer.build().to(DTYPES[run.train.dtype]) for layer in layers[1:-2]]


class _FusedRMSNorm(Function):
    """What the kernel of a GPU keeps: its input, the weight and one number per token.

    torch's CPU build computes the norm in steps and keeps two fp32 tensors more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.float().pow(2).mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def blocks_keep(run: RunConfig, blocks: int) -> int:
    """Bytes that the first `blocks` blocks keep of one micro-batch, parameters excluded."""
    model = blocks_of(run)
    shape = (run.train.micro_batch_size, run.model.seq_length, run.model.hidden_size)
    x = torch.zeros(shape, dtype=DTYPES[run.train.dtype], requires_grad=True)
    known = {p.untyped_storage().data_ptr() for block in model for p in block.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "rms_norm",
            lambda x, shape, weight, eps: _FusedRMSNorm.apply(x, weight, eps),
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for block in model[:blocks]:
                x = block(x)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in known)


def loss_takes(run: RunConfig) -> int:
    """Peak bytes of the head's loss and its backward pass, beside its two inputs."""
    tokens, dtype = (run.train.micro_batch_size, run.model.seq_length), DTYPES[run.train.dtype]
    hidden = torch.zeros(*tokens, run.model.hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.zeros(run.padded_vocab_size, hidden.shape[-1], dtype=dtype, requires_grad=True)
    targets = Targets(torch.zeros(tokens, dtype=torch.int64))
    with pytest.MonkeyPatch.context() as patch, Held() as held:
        patch.setattr(file, "BLOCK_PER_THREAD", file.BLOCK_ELEMENTS)  # as on a GPU
        held.reset()
        before = held.peak
        file.head_loss(hidden, weight, targets, SERIAL, run.model.vocab_size).backward()
    return held.peak - before
