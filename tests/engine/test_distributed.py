"""DeepSpeed gets the index of a rank's device; MPI is there only where oneCCL wants it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pretrain_gpt_alcf
from megatron.config.errors import ConfigError
from megatron.engine.distributed import start_distributed, start_mpi, stop_mpi
from megatron.launch.ranks import Ranks
from tests.equivalence import front
from tests.equivalence.case import Case
from tests.spawn import run
from tests.training.test_device import visible


class Reached(Exception):
    """The process group would be joined now."""


@pytest.mark.parametrize(("devices", "local_rank", "index"), [(1, 3, 0), (4, 3, 3), (2, 3, 1)])
def test_deepspeed_gets_the_devices_index(
    devices: int, local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frontier shows each rank one device: local rank 3 of 8 has device 0."""
    visible(monkeypatch, "cuda", devices, "AMD Instinct MI250X")
    chosen: list[Any] = []

    def joined(backend: str, rank: int, size: int, device_index: int, *_: Any, name: str) -> None:
        chosen.extend([backend, device_index])
        raise Reached

    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(pretrain_gpt_alcf, "start_distributed", joined)
    monkeypatch.setattr(pretrain_gpt_alcf.log, "setup", lambda *a, **k: None)  # of all tests
    with pytest.raises(Reached):
        pretrain_gpt_alcf.pretrain(front.run_config({}), Ranks(11, local_rank, 16, 8, "Slurm"))
    assert chosen == [index, "nccl", index]


def trained_as_device_0() -> tuple[str | None, str | None, float]:
    """LOCAL_RANK and Open MPI's after the start, and a loss of a rank whose local rank is not 0."""
    config = front.run_config(Case(dp=2).variables())
    start_distributed("gloo", dist.get_rank(), 2, 0, "", 60)
    ours = os.environ.get("LOCAL_RANK"), os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
    return *ours, front.steps(config, front.build(config), 0, 1)[0][0]


def test_a_local_rank_is_no_device() -> None:
    """DeepSpeed asserts that Open MPI's local rank is LOCAL_RANK."""
    made = run(trained_as_device_0, 2, environ={"OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    assert [(own, theirs) for own, theirs, _ in made] == [("0", "0")] * 2
    assert made[0][2] == made[1][2]


# --- MPI ------------------------------------------------------------------------------------------


def fake_mpi4py(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """mpi4py whose MPI notes that it was ended."""
    calls: list[str] = []
    mpi4py, mpi = ModuleType("mpi4py"), ModuleType("mpi4py.MPI")
    vars(mpi4py).update(rc=SimpleNamespace(finalize=None), MPI=mpi)
    vars(mpi).update(
        Get_library_version=lambda: "MPI 4\n", Finalize=lambda: calls.append("Finalize")
    )
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    return calls


def test_mpi_is_left_alone_unless_oneccl_meets_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_mpi4py(monkeypatch)
    monkeypatch.delenv("CCL_KVS_MODE", raising=False)
    start_mpi()
    stop_mpi()
    assert calls == [] and sys.modules["mpi4py"].rc.finalize is None


def test_mpi_is_initialised_and_ended_by_a_run_that_ends_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that fails must not wait for the others in MPI_Finalize: that is not left to exit."""
    calls = fake_mpi4py(monkeypatch)
    monkeypatch.setenv("CCL_KVS_MODE", "mpi")
    start_mpi()
    assert sys.modules["mpi4py"].rc.finalize is False
    stop_mpi()
    assert calls == ["Finalize"]


def test_mpi_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise RuntimeError('cannot load MPI library')\n")
    monkeypatch.delitem(sys.modules, "mpi4py", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CCL_KVS_MODE", "mpi")
    with pytest.raises(ConfigError, match=r"cannot load MPI library.*CCL_KVS_MODE="):
        start_mpi()
