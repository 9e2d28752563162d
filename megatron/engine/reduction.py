"""Gradients over the data-parallel ranks: a bucket's reduction begins when its last one is there.

The backward pass goes on meanwhile. A rank sends the bytes of a reduce-scatter: gloo's own would
send an all-reduce's, so there each rank sends every other one its slice and sums what it gets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.engine.buckets import Bucket
from megatron.parallel.groups import Axis
from megatron.parallel.waiting import wait_for

IN_FLIGHT = 1 << 24  # elements of reductions under way; more would keep more buffers
WITHOUT_REDUCE_SCATTER = ("gloo",)  # backends whose own is an all-reduce


class _Flight(NamedTuple):
    """A reduction under way.

    Attributes:
        bucket: whose gradient it is.
        gradient: what is sent. It is held until then on every backend, as NCCL holds it: so the
            memory of a step does not depend on who was quicker.
        work: to wait for.
        result: this rank's slice, once it has come.
    """

    bucket: Bucket
    gradient: Tensor
    work: dist.Work
    result: Callable[[], Tensor]


def _exchange(gradient: Tensor, dp: Axis) -> tuple[dist.Work, Callable[[], Tensor]]:
    received = torch.empty_like(gradient)
    work = dist.all_to_all_single(received, gradient, group=dp.group, async_op=True)
    return work, lambda: received.view(dp.size, -1).sum(0, dtype=torch.float32)


def _reduce_scatter(gradient: Tensor, dp: Axis) -> tuple[dist.Work, Callable[[], Tensor]]:
    own = gradient.new_empty(gradient.numel() // dp.size)
    work = dist.reduce_scatter_tensor(own, gradient, group=dp.group, async_op=True)
    return work, lambda: own


class Reduction:
    """Takes the gradients of all buckets as a backward pass makes them.

    Args:
        buckets: of the model; the order of their reductions, which is that of all ranks.
        dp: the ranks that own slices.
        sent_in: type in which gradients go over the ranks.
        each: after every micro-batch, not the last alone.
    """

    def __init__(
        self, buckets: Sequence[Bucket], dp: Axis, sent_in: torch.dtype, *, each: bool
    ) -> None:
        self._buckets, self._dp = buckets, dp
        self._sent_in = torch.float32 if dp.size == 1 else sent_in
        self._each = each and dp.size > 1
        self._reduces, self._added_in = True, self._sent_in  # in this micro-batch
        self._next = 0  # bucket
        self._flying: deque[_Flight] = deque()
        backend = None if dp.group is None else dist.get_backend(dp.group)
        self._send = _exchange if backend in WITHOUT_REDUCE_SCATTER else _reduce_scatter
        # One rank in fp32 leaves gradients where autograd puts them.
        self._is_direct = dp.size == 1 and buckets[0].parameters[0].dtype == torch.float32
        self._hooks = []
        for bucket in () if self._is_direct else buckets:
            for place, parameter in enumerate(bucket.parameters):
                hook: Callable[[nn.Parameter], None] = partial(self._arrived, bucket, place)
                register: Callable[..., Any] = parameter.register_post_accumulate_grad_hook
                self._hooks.append(register(hook))

    def begin(self, number: int, of: int) -> None:
        """Comes before the backward pass of micro-batch `number`, 0 .. of - 1."""
        self._reduces = self._each or number == of - 1
        adds = of > 1 and not self._each
        self._added_in = torch.float32 if adds else self._sent_in
        self._next = 0
        for bucket in self._buckets:
            bucket.arrived = 0

    def end(self) -> None:
        """Comes after a backward pass: what has not come by now will not.

        After the last one `master.grad` of each bucket is the sum of all.
        """
        if self._is_direct:
            for bucket in self._buckets if self._reduces else ():
                (parameter,) = bucket.parameters
                gradient, parameter.grad = parameter.grad, None
                bucket.receive(
                    torch.zeros_like(bucket.master) if gradient is None else gradient.view(-1)
                )
        elif self._reduces:
            while self._next < len(self._buckets):
                self._launch()
            while self._flying:
                self._land()

    def close(self) -> None:
        """Leaves the parameters without hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _arrived(self, bucket: Bucket, place: int, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        bucket.add(place, parameter.grad, self._added_in)
        parameter.grad = None
        buckets = self._buckets
        while (
            self._reduces
            and self._next < len(buckets)
            and buckets[self._next].arrived == len(buckets[self._next].parameters)
        ):
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        gradient = bucket.take(self._sent_in)
        if self._dp.group is None:
            bucket.receive(gradient)
            return
        flying, size = self._flying, gradient.numel()
        while flying and size + sum(one.gradient.numel() for one in flying) > IN_FLIGHT:
            self._land()
        flying.append(_Flight(bucket, gradient, *self._send(gradient, self._dp)))

    def _land(self) -> None:
        flight = self._flying.popleft()
        wait_for(flight.work, "reduce_scatter of gradients")
        flight.bucket.receive(flight.result())


def in_backward_order(
    buckets: Sequence[Bucket], parameters: Sequence[nn.Parameter]
) -> list[Bucket]:
    """Buckets by when their last gradient comes, which is that of their first parameter.

    Args:
        buckets: of all groups.
        parameters: in the order of the forward pass.
    """
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    return sorted(
        buckets, key=lambda bucket: -min(places[id(parameter)] for parameter in bucket.parameters)
    )
