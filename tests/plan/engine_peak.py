"""The most bytes that a rank's tensors hold in a step of the real engine, counted on this host."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.equivalence import front


class Held(TorchDispatchMode):
    """Bytes of the storages that are alive: what operations made, and what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0
        for tensor in gc.get_objects():
            if isinstance(tensor, Tensor):
                self._add(tensor)

    def reset(self) -> None:
        """Begin a new peak."""
        self._count()
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self._count()
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def _count(self) -> None:
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        self.now = sum(size for _, size in self._alive.values())
        self.peak = max(self.peak, self.now)


class _FusedRMSNorm(Function):
    """What the kernel of a GPU keeps: its input, the weight and one number per token.

    torch's CPU build computes the norm in steps and keeps two fp32 tensors more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            scale = x.float().pow(2).mean(-1, keepdim=True).add(eps).rsqrt()
            y = (x.float() * scale).to(x.dtype) * weight
        ctx.save_for_backward(x, weight, scale)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        with torch.utils._python_dispatch._disable_current_modes():
            g, n = (grad * weight).float(), x.float() * scale
            dx = (scale * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype)
            dw = (grad.float() * n).flatten(0, -2).sum(0).to(weight.dtype)
        return dx.clone(), dw.clone(), None


def rank(variables):
    torch.nn.functional.rms_norm = lambda x, shape, weight, eps: _FusedRMSNorm.apply(x, weight, eps)
    config = front.run_config(variables)
    base = Held().now
    engine = front.build(config)
    front.steps(config, engine, 0, 1)
    gc.collect()
    marks = {}
    with Held() as held:
        marks['still'] = held.now
        loss = engine._loss
        def noting(logits, labels):
            marks['forward'] = max(marks.get('forward',0), held.peak)
            marks['logits now'] = held.now
            return loss(logits, labels)
        engine._loss = noting
        ds = engine._deepspeed
        back, step = ds.backward, ds.step
        def backward(*a, **k):
            marks['before backward']=held.now
            held.reset()
            r = back(*a, **k)
            marks['backward'] = max(marks.get('backward',0), held.peak)
            marks['after backward'] = held.now
            held.reset()
            return r
        def st(*a, **k):
            r = step(*a, **k)
            marks['step'] = max(marks.get('step',0), held.peak)
            held.reset()
            return r
        ds.backward, ds.step = backward, st
        held.reset()
        front.steps(config, engine, 1, 2)
        marks['end'] = held.now
    marks['base']=base
    return marks

