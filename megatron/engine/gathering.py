"""The model's weights on their way from the ranks' slices: a layer waits for its own alone.

The gathering of a step's weights so runs on behind what comes before the next forward pass, and
behind its first layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.engine.buckets import Bucket
from megatron.model.layer import Layer
from megatron.parallel.waiting import wait_for

WEIGHTS = "all_gather of weights"


class Gathering:
    """What is under way; empty with one rank."""

    def __init__(self) -> None:
        self._works: dict[int, dist.Work] = {}  # by the parameters that they bring

    @torch.no_grad()
    def begin(self, buckets: Iterable[Bucket]) -> None:
        """Rebuilds the weights of buckets, the first ones first; a collective."""
        self.finish()
        for bucket in buckets:
            work = bucket.gather()
            if work is not None:
                self._works |= {id(parameter): work for parameter in bucket.parameters}

    def finish(self) -> None:
        """Waits for all."""
        for work in self._works.values():
            wait_for(work, WEIGHTS)
        self._works = {}

    def wait_for(self, module: nn.Module) -> None:
        """Waits for the weights of a layer."""
        if self._works:
            for parameter in module.parameters():
                work = self._works.pop(id(parameter), None)
                if work is not None:
                    wait_for(work, WEIGHTS)

    def waiting(self, layer: Layer) -> Layer:
        """The layer with a forward pass that waits; outside of what is compiled."""
        compute = layer.forward

        def forward(module: nn.Module, *inputs: Any) -> Tensor:
            self.wait_for(module)
            output: Tensor = module(*inputs) if compute is None else compute(module, *inputs)
            return output

        return dataclasses.replace(layer, forward=forward)
