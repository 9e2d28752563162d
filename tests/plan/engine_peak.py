"""The most bytes that a rank's tensors hold in a step of the real engine, counted on this host."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron.engine import reduction
from megatron.parallel import head_loss
from tests.equivalence import front

aten = torch.ops.aten
IN_TYPE = {
    aten.mm.default: 1,
    aten.bmm.default: 1,
    aten._scaled_dot_product_flash_attention_for_cpu.default: 1,  # its sums stay fp32
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 3,
}
"""Products -> how many of their results have the inputs' type."""


class InFp32(TorchDispatchMode):
    """Products of 16 bits, which some CPUs form a hundred times slower than those of fp32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is aten.mm.out:
            return given["out"].copy_(aten.mm(args[0].float(), args[1].float()))
        if func not in IN_TYPE or args[0].dtype == torch.float32:
            return func(*args, **given)
        exact = func(*(x.float() if isinstance(x, Tensor) else x for x in args), **given)
        results, count = exact if isinstance(exact, tuple) else (exact,), IN_TYPE[func]
        rounded = *(x.to(args[0].dtype) for x in results[:count]), *results[count:]
        return rounded if isinstance(exact, tuple) else rounded[0]


class Held(InFp32):
    """Bytes of the storages that are alive: what operations made, and what was there before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak: int = 0
        for tensor in gc.get_objects():
            if issubclass(type(tensor), Tensor):  # isinstance asks what a dead proxy stood for
                self._add(tensor)

    def reset(self) -> None:
        """Begin a new peak at what is held now."""
        self.peak = 0
        self._count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if issubclass(type(tensor), Tensor):  # isinstance asks what a dead proxy stood for
                self._add(tensor)
        self._count()
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = (
                StorageWeakRef(storage),  # type: ignore[no-untyped-call]
                storage.nbytes(),
            )

    def _count(self) -> None:
        self._alive = {
            key: pair
            for key, pair in self._alive.items()
            if not pair[0].expired()  # type: ignore[no-untyped-call]
        }
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


class _FusedRMSNorm(Function):
    """What the kernel of a GPU keeps: its input, the weight and one number per token.

    torch's CPU build computes the norm in steps and keeps two fp32 tensors more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with _disable_current_modes():
            scale = x.float().pow(2).mean(-1, keepdim=True).add(eps).rsqrt()
            y = (x.float() * scale).to(x.dtype) * weight
        ctx.save_for_backward(x, weight, scale)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        with _disable_current_modes():
            g, n = (grad * weight).float(), x.float() * scale
            dx = (scale * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype)
            dw = (grad.float() * n).flatten(0, -2).sum(0).to(weight.dtype)
        return dx.clone(), dw.clone(), None


def peak_of_a_step(variables: Mapping[str, str]) -> int:
    """Bytes that this rank holds at most in the second step of a tiny run."""
    config = front.run_config(variables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "rms_norm", _fused)
        patch.setattr(reduction, "WITHOUT_REDUCE_SCATTER", ())  # as on a GPU
        patch.setattr(reduction, "_reduce_scatter", _reduce_scatter)
        patch.setattr(head_loss, "BLOCK_PER_THREAD", head_loss.BLOCK_ELEMENTS)  # as on a GPU
        engine = front.build(config)
        with InFp32():
            front.steps(config, engine, 0, 1)
        gc.collect()
        with Held() as held:
            held.reset()
            front.steps(config, engine, 1, 2)
    return int(held.peak)


class _Unseen:
    """A collective whose own buffers are not counted: gloo reduces a copy, a GPU does not."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        with _disable_current_modes():
            self._work.wait()


def _reduce_scatter(gradient: Tensor, dp: Any) -> Any:
    own = gradient.new_empty(gradient.numel() // dp.size)
    with _disable_current_modes():
        work = dist.reduce_scatter_tensor(own, gradient, group=dp.group, async_op=True)
    return _Unseen(work), lambda: own


def _fused(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Any:
    return _FusedRMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
