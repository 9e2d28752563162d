"""What older versions of DeepSpeed do otherwise.

They apply gradients that are not finite. From 0.19.8 on a step whose norm is not finite changes
nothing, in every type; before, in fp16 only: the norm becomes -1, and of it and the other groups'
norms a finite total.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import bf16_optimizer
from torch import Tensor

from megatron.launch.versions import numbers


def reject_overflows(zero: Any, version: str = deepspeed.__version__) -> None:
    """Lets a DeepSpeed before 0.19.8 skip a step with gradients that are not finite, on all ranks.

    Args:
        zero: DeepSpeed's optimizer, changed in place.
        version: of DeepSpeed.
    """
    if numbers(version) >= (0, 19, 8):
        return
    is_bf16 = isinstance(zero, bf16_optimizer.BF16_Optimizer)
    zero.step = functools.partial(_bf16_step if is_bf16 else _zero_step, zero, zero.step)


def _zero_step(zero: Any, step: Callable[..., None], *args: Any) -> None:
    """ZeRO's optimizers look for themselves in fp16; what they do about it, they do in any type."""
    if zero.dtype != torch.float16:
        zero.check_overflow()  # one more message between the ranks
    step(*args)
    if zero.overflow:
        zero._global_grad_norm = math.inf


def _bf16_step(zero: Any, step: Callable[..., None], *args: Any) -> None:
    gradients, _ = zero.get_grads_for_norm()
    norm = bf16_optimizer.get_global_norm_of_tensors(
        input_tensors=gradients, mpu=zero.mpu, norm_type=zero.norm_type
    )
    zero.overflow = bool(norm < 0)
    if not zero.overflow:
        step(*args)
        return
    zero._global_grad_norm = math.inf
    zero.clear_hp_grads()
    zero.clear_lp_grads()


def scale_in_the_loss(engine: Any, version: str = deepspeed.__version__) -> None:
    """Lets the last stage of a pipeline divide gradients by the micro-batches in the loss.

    DeepSpeed before 0.19.6 divides them where they enter the module's output, the hidden states:
    the head, which makes the loss of these, would keep its own undivided.

    Args:
        engine: DeepSpeed's, changed in place.
        version: of DeepSpeed.
    """
    if numbers(version) >= (0, 19, 6) or not engine.is_last_stage():
        return
    whole = engine.module.loss_fn

    def divided(*inputs: Any) -> Tensor:
        loss: Tensor = whole(*inputs)
        if loss.requires_grad:
            steps = engine.gradient_accumulation_steps()
            loss.register_hook(lambda gradient: gradient / steps)  # type: ignore[no-untyped-call]
        return loss

    engine.module.loss_fn = divided
    engine._backward_prologue_per_tensor = lambda gradient: gradient
