"""One axis over all ranks of a test's world."""

from __future__ import annotations

import torch.distributed as dist

from megatron.config.layout import Layout
from megatron.parallel.groups import Axis, make_groups


def whole_world() -> Axis:
    """The tensor-parallel axis on which every rank of the world stands."""
    return make_groups(Layout(tp=dist.get_world_size())).tp


def whole_sequence() -> Axis:
    """The sequence-parallel axis on which every rank of the world stands."""
    return make_groups(Layout(sp=dist.get_world_size())).sp
