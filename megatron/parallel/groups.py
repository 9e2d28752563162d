"""The process groups of a rank, made once and passed to the code that needs them.

A layer takes an `Axis`; the axis of size one has no group and is the serial case. Nothing here is
global.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist

from megatron.config.layout import Layout


@dataclass(frozen=True)
class Axis:
    """One axis of the layout as a rank sees it.

    Attributes:
        group: the ranks' process group; None where size is 1.
        rank: this rank's place on the axis.
        size: ranks on the axis.
        ranks: their ranks in the world, in axis order.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size == len(self.ranks)
        assert (self.group is None) == (self.size == 1)


SERIAL = Axis(group=None, rank=0, size=1, ranks=(0,))


@dataclass(frozen=True)
class Groups:
    """The axes of a rank.

    Attributes:
        layout: sizes of the axes.
        rank: this one, in the world.
        tp, dp, pp, sp: the axes of the layout.
        dp_sp: dp and sp as one axis, dp the slower: the ranks that hold the same weights.
    """

    layout: Layout
    rank: int
    tp: Axis
    dp: Axis
    pp: Axis
    sp: Axis
    dp_sp: Axis

    def without_sequence(self) -> Groups:
        """The groups of `Layout.without_sequence`: dp is `dp_sp`, sp this rank alone."""
        alone = Axis(group=None, rank=0, size=1, ranks=(self.rank,))
        return Groups(
            layout=self.layout.without_sequence(),
            rank=self.rank,
            tp=self.tp,
            dp=self.dp_sp,
            pp=self.pp,
            sp=alone,
            dp_sp=self.dp_sp,
        )


def new_group(ranks: Iterable[int], backend: str | None = None) -> dist.ProcessGroup:
    """A group made by its members only, so that the start-up time does not grow with the world.

    Args:
        ranks: members, this rank among them.
        backend: of the group; None: the world's.
    """
    # Without one, torch takes its backend's default, whatever the world's timeout is.
    world = dist.group.WORLD
    assert world is not None
    backend_of_world = world._get_backend(world._device_types[0])
    options = getattr(backend_of_world, "options", None)  # oneCCL's and torch's fake one have none
    timeout = None if options is None else options._timeout
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True
    )
    return group


def make_groups(layout: Layout) -> Groups:
    """Makes this rank's groups; torch.distributed must be initialised with `layout.world` ranks.

    Raises:
        ValueError: the world has another size than the layout.
    """
    world = dist.get_world_size()
    if world != layout.world:
        raise ValueError(
            f"the world has {world} ranks, but TP x PP x DP x SP = "
            f"{layout.tp} x {layout.pp} x {layout.dp} x {layout.sp} = {layout.world}"
        )
    rank = dist.get_rank()

    def axis(ranks: tuple[int, ...]) -> Axis:
        group = new_group(ranks) if len(ranks) > 1 else None
        return Axis(group=group, rank=ranks.index(rank), size=len(ranks), ranks=ranks)

    sp, dp = axis(layout.sp_ranks(rank)), axis(layout.dp_ranks(rank))
    if sp.size == 1 or dp.size == 1:
        dp_sp = dp if sp.size == 1 else sp  # one of the two is the whole axis
    else:
        dp_sp = axis(layout.without_sequence().dp_ranks(rank))
    return Groups(
        layout=layout,
        rank=rank,
        tp=axis(layout.tp_ranks(rank)),
        dp=dp,
        pp=axis(layout.pp_ranks(rank)),
        sp=sp,
        dp_sp=dp_sp,
    )
