"""Collectives of a layer that run beside what it computes, until their result is asked for.

On the host they run in threads of the backend, on a device in a stream of their own. Inside a
compiled graph each is two operations, in the order in which they are written here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.groups import Axis
from megatron.parallel.waiting import wait_for


class Pending(NamedTuple):
    """A collective under way.

    Attributes:
        result: undefined until `finished` returns it.
        work: the backend's handle, which keeps what is sent; None inside a compiled graph.
    """

    result: Tensor
    work: dist.Work | None


def start_all_reduce(x: Tensor, axis: Axis) -> Pending:
    """The sum of the ranks' contiguous x, written into x: it must be the caller's own."""
    if torch.compiler.is_compiling():
        total = torch.ops._c10d_functional.all_reduce(x, "sum", _name(axis))
        return Pending(total, None)
    return Pending(x, dist.all_reduce(x, group=axis.group, async_op=True))


def start_all_gather(x: Tensor, axis: Axis) -> Pending:
    """The ranks' x (n, ...) one after the other: (axis.size * n, ...)."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        whole = torch.ops._c10d_functional.all_gather_into_tensor(x, axis.size, _name(axis))
        return Pending(whole, None)
    y = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    return Pending(y, dist.all_gather_into_tensor(y, x, group=axis.group, async_op=True))


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """Of the sum of the ranks' x (axis.size * n, ...), this rank's n rows."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        op = torch.ops._c10d_functional.reduce_scatter_tensor
        return Pending(op(x, "sum", axis.size, _name(axis)), None)
    y = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return Pending(y, dist.reduce_scatter_tensor(y, x, group=axis.group, async_op=True))


def finished(pending: Pending) -> Tensor:
    """The result: waits for it on the host, or makes the device's present stream wait."""
    if pending.work is None:
        result: Tensor = torch.ops._c10d_functional.wait_tensor(pending.result)
        return result
    wait_for(pending.work, "collective of tensor parallelism")
    return pending.result


def _name(axis: Axis) -> str:
    assert axis.group is not None
    return axis.group.group_name
