"""The list of layers as one module: the model of a run without pipeline stages.

Parameters have the names of DeepSpeed's PipelineModule, so a checkpoint does not depend on the
number of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from megatron.model.layer import Layer, recomputed
from megatron.parallel.head_loss import Targets, TargetsOf


class Stack(nn.Module):
    """Applies the layers one after the other, the head last."""

    def __init__(
        self,
        layers: Sequence[Layer],
        recompute_num_layers: int = 0,
        targets: TargetsOf = Targets,
    ) -> None:
        """Builds every layer.

        Args:
            layers: the model.
            recompute_num_layers: keeps the input of every n-th of the layers that allow it, and
                recomputes the rest in the backward pass; 0: leaves that to the layers themselves.
            targets: what the loss of a micro-batch is measured against.
        """
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.targets = targets
        calls: list[Callable[..., Tensor]] = []
        for index, layer in enumerate(layers):
            module = self._module(index, layer)
            calls.append(module if layer.forward is None else partial(layer.forward, module))
        *self._calls, head = recompute_runs(
            calls, [layer.recompute for layer in layers], recompute_num_layers
        )
        self._head = partial(head)  # a module would be registered again

    def _module(self, index: int, layer: Layer) -> nn.Module:
        if layer.tied_key is None:
            module = layer.build()
            self.add_module(str(index), module)
            return module
        if layer.tied_key not in self.tied_modules:
            self.tied_modules[layer.tied_key] = layer.build()
        return self.tied_modules[layer.tied_key]

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """tokens (B, S) int64 -> loss of the labels (B, S), or this rank's logits (B, S, V/tp)."""
        x = tokens
        for call in self._calls:
            x = call(x)
        return self._head(x) if labels is None else self._head(x, self.targets(labels))


def recompute_runs(
    calls: list[Callable[..., Tensor]], allowed: list[bool], length: int
) -> list[Callable[..., Tensor]]:
    """The calls, with up to `length` consecutive recomputable ones joined into one."""
    if length == 0:
        return calls
    result: list[Callable[..., Tensor]] = []
    run: list[Callable[[Tensor], Tensor]] = []
    for call, may in zip(calls, allowed, strict=True):
        if run and (not may or len(run) == length):
            result.append(partial(recomputed, partial(_chain, tuple(run))))
            run = []
        if may:
            run.append(call)
        else:
            result.append(call)
    if run:
        result.append(partial(recomputed, partial(_chain, tuple(run))))
    return result


def _chain(calls: tuple[Callable[[Tensor], Tensor], ...], x: Tensor) -> Tensor:
    for call in calls:
        x = call(x)
    return x
