"""Compiled blocks: one graph for all blocks of a kind, made before the first step.

A block is compiled for the input of a training micro-batch only. Any other input, such as the one
sample of a text that is drawn, takes the eager block: a graph costs more than it would gain there.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor, nn

from megatron.model.layer import Layer

BACKEND = "inductor"


class CompiledForward:
    """A block's forward: compiled for one shape of input, eager for the others.

    Args:
        block: an input and an output of one shape (B, s, H).
        shape: that is compiled.
    """

    def __init__(self, block: nn.Module, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._eager = block.forward
        self._compiled = torch.compile(block.forward, dynamic=False, backend=BACKEND)

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, s, H) -> (B, s, H)."""
        if x.shape != self.shape:
            eager: Tensor = self._eager(x)
            return eager
        if torch.is_grad_enabled():
            y: Tensor = self._compiled(x)
            return y
        # A graph holds for one grad mode and for inputs that need a gradient or do not. Evaluation
        # takes the graph of training, whose activations are free again at the end of the block.
        with torch.enable_grad():
            y = self._compiled(x.detach().requires_grad_())
        return y.detach()


def compiled_layer(layer: Layer, shape: tuple[int, ...]) -> Layer:
    """The layer with its module's forward compiled for inputs of `shape`."""

    def build() -> nn.Module:
        module = layer.build()
        module.forward = CompiledForward(module, shape)
        return module

    return dataclasses.replace(layer, build=build)


def warm_up(module: nn.Module) -> tuple[int, float]:
    """Runs each compiled block of a module forward and backward once, on zeros.

    So no step compiles, and pipeline stages compile at the same time instead of one after the
    other. A collective of the tensor- and sequence-parallel ranks. No parameter gets a gradient.

    Returns:
        Compiled blocks of this rank, and the seconds they took.
    """
    start, blocks = time.perf_counter(), 0
    for block in module.modules():
        if isinstance(block.forward, CompiledForward):
            blocks += 1
            weight = next(block.parameters())
            x = weight.new_zeros(block.forward.shape).requires_grad_()
            y = block(x)
            torch.autograd.grad(y, x, torch.zeros_like(y))
    return blocks, time.perf_counter() - start
