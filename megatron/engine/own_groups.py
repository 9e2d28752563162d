"""Process groups on DeepSpeed's behalf: a rank makes those it is in, and none for anyone else.

DeepSpeed loops over all groups of the world, each a collective of the world: at TP 2, PP 8 that is
2,129 of them on 3,072 ranks. Here their number does not depend on the world.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch.distributed as dist

from megatron.parallel.groups import Axis


def groups_of(*axes: Axis) -> list[dist.ProcessGroup]:
    """The axes' groups; for axes of one rank DeepSpeed is given one group of this rank alone."""
    alone = None
    if any(axis.group is None for axis in axes):
        alone = members_group([dist.get_rank()])
    return [alone if axis.group is None else axis.group for axis in axes]


def members_group(ranks: Iterable[int]) -> dist.ProcessGroup:
    """A group made by its members only; for all of the world the world's own.

    Returns:
        The group, or GroupMember.NON_GROUP_MEMBER on a rank that is not in it.
    """
    ranks = list(ranks)
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if dist.get_rank() not in ranks:
        return dist.GroupMember.NON_GROUP_MEMBER
    return dist.new_group(ranks, use_local_synchronization=True)


def sub_axis(axis: Axis, places: Iterable[int]) -> Axis:
    """Some ranks of an axis, this one among them, as an axis of its own.

    Args:
        axis: the larger one.
        places: on it, in order.
    """
    ranks = tuple(axis.ranks[place] for place in places)
    rank = ranks.index(axis.ranks[axis.rank])
    group = members_group(ranks) if len(ranks) > 1 else None
    return Axis(group=group, rank=rank, size=len(ranks), ranks=ranks)


def made_by_members() -> contextlib.AbstractContextManager[None]:
    """Inside, DeepSpeed's own requests for groups are met by `members_group`."""
    return replaced(deepspeed.comm, "new_group", members_group)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, a name of a module or class of DeepSpeed's means something else."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
