"""Buckets: parameters that are reduced, updated and gathered together, each rank owning a slice.

The weights of a bucket are one flat tensor, of which the model's parameters are views. A rank's
slice of it, in fp32, is what the optimizer updates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.engine.shards import Span
from megatron.parallel.groups import Axis
from megatron.parallel.partial_gradients import is_partial

LARGEST = 1 << 22  # elements of a bucket, unless one parameter has more
ALIGNMENT = 64  # elements at whose multiples parameters and slices begin


class TensorKind(NamedTuple):
    """What tensor parallelism makes of a parameter; alike in a bucket.

    Attributes:
        sharded: each TP rank has its own part; else all have the same.
        partial: each TP rank's gradient is a part of the sum that is wanted.
    """

    sharded: bool
    partial: bool


class Bucket:
    """Weights and gradients of some parameters.

    Args:
        parameters: of one kind and type, on one device; their data becomes views of the bucket.
        dp: the ranks that own equal slices. With one rank a bucket has one parameter, which stays
            where it is.

    Attributes:
        parameters: of the bucket.
        kind: theirs.
        master: this rank's slice of the weights in fp32, 1-D, for the optimizer.
        arrived: gradients that a backward pass has added.
    """

    def __init__(self, parameters: list[nn.Parameter], dp: Axis) -> None:
        self.parameters, self.kind, self.arrived = parameters, kind_of(parameters[0]), 0
        self._dp = dp
        if dp.size == 1:
            assert len(parameters) == 1
            self._starts, self._weights = [0], parameters[0].data.view(-1)
        else:
            self._starts, self._weights = _flattened(parameters, ALIGNMENT * dp.size)
        length = self._weights.numel() // dp.size
        self._own = self._weights.narrow(0, dp.rank * length, length)
        self.master = nn.Parameter(self._own.float())  # fp32: no copy
        self._buffer: Tensor | None = None
        self._views: list[Tensor] = []  # of the buffer, one a parameter
        self._filled: set[int] = set()

    def spans(self) -> Iterator[Span]:
        """The runs of parameters in this rank's slice."""
        length = self.master.numel()
        begin = self._dp.rank * length
        for parameter, start in zip(self.parameters, self._starts, strict=True):
            first, last = max(start, begin), min(start + parameter.numel(), begin + length)
            if first < last:
                yield Span(parameter, self.master, first - begin, first - start, last - first)

    def add(self, place: int, gradient: Tensor, dtype: torch.dtype) -> None:
        """Adds the gradient of the parameter `place` to a buffer of `dtype`."""
        if self._buffer is None:
            self._buffer = torch.empty_like(self._weights, dtype=dtype)
            self._views = self._views_of(self._buffer)
        if place in self._filled:
            self._views[place].add_(gradient)
        else:
            self._views[place].copy_(gradient)
            self._filled.add(place)
        self.arrived += 1

    def take(self, dtype: torch.dtype) -> Tensor:
        """The flat gradient, which the bucket forgets; zero where there was none."""
        buffer, filled = self._buffer, self._filled
        self._buffer, self._views, self._filled = None, [], set()
        if buffer is None:
            return torch.zeros_like(self._weights, dtype=dtype)
        end = 0
        for place, start in enumerate(self._starts):
            if place in filled:
                buffer[end:start].zero_()
                end = start + self.parameters[place].numel()
        buffer[end:].zero_()
        return buffer.to(dtype)

    def receive(self, gradient: Tensor) -> None:
        """Adds a reduced gradient of this rank's slice, 1-D, to that of the optimizer."""
        if self.master.grad is None:
            self.master.grad = gradient.float()
        else:
            self.master.grad += gradient

    def gather(self) -> dist.Work | None:
        """Rebuilds the model's weights from all slices; a collective that runs on by itself.

        Returns:
            What to wait for; None where this is done.
        """
        if self._own.dtype != torch.float32:
            self._own.copy_(self.master.detach())
        if self._dp.group is None:
            return None
        work: dist.Work = dist.all_gather_into_tensor(
            self._weights, self._own, group=self._dp.group, async_op=True
        )
        return work

    def _views_of(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer.narrow(0, start, parameter.numel()).view(parameter.shape)
            for parameter, start in zip(self.parameters, self._starts, strict=True)
        ]


def _flattened(parameters: list[nn.Parameter], multiple: int) -> tuple[list[int], Tensor]:
    """Where each parameter begins, and the flat weights, of which they are views from here on."""
    aligned = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    *starts, end = itertools.accumulate(aligned, initial=0)
    flat = parameters[0].data.new_zeros(-(-end // multiple) * multiple)
    for parameter, start in zip(parameters, starts, strict=True):
        view = flat.narrow(0, start, parameter.numel()).view(parameter.shape)
        parameter.data = view.copy_(parameter.data)
    return starts, flat


def kind_of(parameter: nn.Parameter) -> TensorKind:
    """What tensor parallelism has marked the parameter as."""
    sharded = getattr(parameter, "tensor_model_parallel", False)
    return TensorKind(sharded, is_partial(parameter))


def buckets_of(parameters: Iterable[nn.Parameter], dp: Axis) -> list[Bucket]:
    """The parameters of one group of the optimizer in buckets.

    A matrix of the vocabulary is a bucket of its own: the head's gradient is the first of a
    backward pass, the embedding's the last.

    Args:
        parameters: in the order of the model.
        dp: the ranks that own slices.
    """
    buckets: list[list[nn.Parameter]] = []
    before: TensorKind | None = None  # of the parameters in the last bucket; None: it is closed
    size = 0
    for parameter in parameters:
        kind = kind_of(parameter)
        alone = dp.size == 1 or getattr(parameter, "is_vocabulary", False)
        size += parameter.numel()
        if alone or kind != before or size > LARGEST:
            buckets.append([])
            size = parameter.numel()
        buckets[-1].append(parameter)
        before = None if alone else kind
    return [Bucket(members, dp) for members in buckets]
