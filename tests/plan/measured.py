"""Bytes that the program's own model and loss keep, counted from tensors on this host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.schema import RunConfig
from megatron.training.build import loss_function, model_layers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Loss = Callable[[Tensor, Tensor], Tensor]


def blocks_and_loss(run: RunConfig) -> tuple[list[nn.Module], Loss]:
    """The run's blocks and its loss, on one rank: the only function here that knows the model."""
    blocks = model_layers(run)[1:-2]
    return [layer.build().to(DTYPES[run.train.dtype]) for layer in blocks], loss_function(run)


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
    model, _ = blocks_and_loss(run)
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


class _Peak(TorchDispatchMode):
    """The most bytes that the results of operations have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result


def loss_takes(run: RunConfig) -> int:
    """Peak bytes from the logits to their gradient."""
    _, loss = blocks_and_loss(run)
    tokens = (run.train.micro_batch_size, run.model.seq_length)
    hidden = torch.zeros(*tokens, 1, dtype=DTYPES[run.train.dtype], requires_grad=True)
    weight = torch.zeros(run.padded_vocab_size, 1, dtype=hidden.dtype)
    with _Peak() as peak:
        logits = nn.functional.linear(hidden, weight)
        loss(logits, torch.zeros(tokens, dtype=torch.int64)).backward()
    return peak.bytes
