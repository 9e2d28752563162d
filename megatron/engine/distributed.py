"""Joining and leaving the process group, and the groups that DeepSpeed asks for.

A rank makes only the groups that it is in. DeepSpeed makes all groups of the world, each by a
collective of the world: at TP 2, PP 8 that is 2,129 of them on 3,072 ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megatron.engine.patches import members_group, patch_cpu_accelerator
from megatron.parallel.groups import Axis
from megatron.parallel.meeting import meet


def start_distributed(
    backend: str,
    rank: int,
    world_size: int,
    local_rank: int,
    init_method: str,
    timeout_s: float,
    name: str = "",
) -> None:
    """Joins the process group and passes it to DeepSpeed.

    Args:
        backend: torch.distributed backend (gloo, nccl, xccl, ccl).
        rank: this process, 0 .. world_size - 1.
        world_size: total number of processes.
        local_rank: this process on its host; DeepSpeed reads it from LOCAL_RANK.
        init_method: `tcp://host:port`, where the ranks meet.
        timeout_s: seconds that a collective may take before the run is taken down, and that ranks
            wait for each other at the start.
        name: of the run.

    Raises:
        ConfigError: the ranks cannot meet there.
        MeetingError: some did not come in time.
    """
    os.environ["LOCAL_RANK"] = str(local_rank)
    patch_cpu_accelerator()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # FutureWarnings from DeepSpeed's deprecated calls; users cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not dist.is_initialized():
        # A single process needs no port, which another run might hold.
        alone = world_size == 1
        store = HashStore() if alone else meet(init_method, rank, world_size, timeout_s, name)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=timeout, store=store
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def stop_distributed() -> None:
    """Leaves all process groups at a run's end; a collective. Close the engine first.

    A backend's thread that releases a tensor while the interpreter exits aborts the process, so all
    tensors are released here.
    """
    if not dist.is_initialized():
        return
    dist.barrier()  # a rank that leaves early closes connections that others still read from
    deepspeed.comm.destroy_process_group()  # torch's groups, and DeepSpeed's references to them
    gc.collect()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses what DeepSpeed prints to stdout, past the logger."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class ModelParallelUnit:
    """DeepSpeed's model-parallel unit (`mpu`) at PP = 1, with the method names that it calls.

    Args:
        tp: tensor-parallel axis.
        dp: the ranks that ZeRO shards states over; with MiCS a shard group.
    """

    def __init__(self, tp: Axis, dp: Axis) -> None:
        self._tp, self._dp = tp, dp
        self._tp_group, self._dp_group = groups_of(tp, dp)

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    def get_model_parallel_group(self) -> Any:
        return self._tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size

    def get_data_parallel_group(self) -> Any:
        return self._dp_group


def groups_of(*axes: Axis) -> list[Any]:
    """The axes' groups; for axes of size one, a group of this rank alone, as DeepSpeed needs."""
    alone = None
    if any(axis.group is None for axis in axes):
        alone = members_group([dist.get_rank()])
    return [alone if axis.group is None else axis.group for axis in axes]


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
