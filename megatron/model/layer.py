"""What a model is made of: entries of a list of layers, and how their modules compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from megatron.parallel.groups import SERIAL, Axis

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Layer:
    """A module not yet built, so that only the pipeline stage that owns it draws its weights.

    Attributes:
        name: prefix of its parameters' names, those DeepSpeed's pipeline gives: `<index>`, or
            `tied_modules.<key>`.
        module: class of what `build` returns.
        build: makes the module, one tensor in and one tensor out. Inside `torch.device("meta")` it
            draws nothing.
        tied_key: layers with the same key share the module built by the first of them.
        forward: (module, input) -> output, where a tied layer uses the module in another way than
            by calling it. The last layer, the head, also takes `Targets` and then gives the loss.
        recompute: whether activation checkpointing may drop its activations.
    """

    name: str
    module: type[nn.Module]
    build: Callable[[], nn.Module]
    tied_key: str | None = None
    forward: Callable[..., Tensor] | None = None
    recompute: bool = False


@dataclass(frozen=True)
class ModelContext:
    """How a model's modules compute, beside its shape; no field changes the function they compute.

    Attributes:
        tp: tensor-parallel axis.
        sp: sequence-parallel axis (Ulysses); B and S are then those of this rank's shard.
        seed: of the initial weights; None: none are drawn, a checkpoint brings them.
        recompute: what the backward pass recomputes: "none", "selective" (all but matrix products)
            or "full" (blocks).
        sequence_parallel: Megatron's: shards the residual stream along the sequence over `tp`.
        attention_kernels: torch's, the first of them that takes the heads; none: torch chooses.
        expand_kv: keys and values are copied for each query head before the attention's kernel.
    """

    tp: Axis = SERIAL
    sp: Axis = SERIAL
    seed: int | None = 1234
    recompute: str = "none"
    sequence_parallel: bool = False
    attention_kernels: tuple[SDPBackend, ...] = ()
    expand_kv: bool = False

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute={self.recompute!r} is not one of {', '.join(RECOMPUTE)}")

    @property
    def linear_options(self) -> dict[str, Any]:
        """What every sharded layer takes."""
        return {"tp": self.tp, "seed": self.seed, "sequence_parallel": self.sequence_parallel}

    @property
    def residual_axis(self) -> Axis:
        """The axis whose ranks hold different positions of the residual stream."""
        return self.tp if self.sequence_parallel else SERIAL


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), which keeps its inputs only and runs again in the backward pass.

    The second run stops once the backward has the last tensor it needs. So a matrix product at the
    end of `function`, and the all-reduce after it, run only once.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    # Nothing here is random, so there is no generator state to keep.
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
