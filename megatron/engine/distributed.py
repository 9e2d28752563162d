"""Joining the process group, with DeepSpeed told what it would else find out at a cost."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import warnings
from collections.abc import Iterator

import deepspeed
import torch.distributed as dist


def start_distributed(
    backend: str, rank: int, world_size: int, local_rank: int, init_method: str, timeout_s: float
) -> None:
    """Joins the process group and hands it to DeepSpeed.

    Args:
        backend: torch.distributed backend (gloo, nccl, xccl, ccl).
        rank: this process, 0 .. world_size - 1.
        world_size: processes in all.
        local_rank: this process on its host; DeepSpeed reads it from LOCAL_RANK.
        init_method: `tcp://host:port` or `file:///path`.
        timeout_s: seconds a collective may take before the run is taken down.
    """
    os.environ["LOCAL_RANK"] = str(local_rank)
    # On a host without accelerator DeepSpeed would compile a C++ all-reduce that only its
    # inference code uses: half a minute, and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        # PyTorch computes fp16 on every CPU, if slowly; DeepSpeed wants instructions for it.
        accelerator.is_fp16_supported = lambda: True
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch has begun to replace; no user can help it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not dist.is_initialized():
        # A process alone needs no port that another run could have taken.
        alone = {"store": dist.HashStore()} if world_size == 1 else {"init_method": init_method}
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **alone)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints its progress straight to stdout; the log is ours."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
