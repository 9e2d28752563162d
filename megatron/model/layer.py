"""One entry of a model's list of layers: how to build it, and what a checkpoint calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


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
            by calling it.
        recompute: whether activation checkpointing may drop what is inside.
    """

    name: str
    module: type[nn.Module]
    build: Callable[[], nn.Module]
    tied_key: str | None = None
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None
    recompute: bool = False


def layer_name(index: int, tied_key: str | None = None) -> str:
    """Prefix of the parameters of the layer at `index` of the list."""
    return str(index) if tied_key is None else f"tied_modules.{tied_key}"
