"""tools/test_dist.py: every collective right on every rank, and found out where it is not."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.launch.ranks import Ranks
from megatron.training.device import Device
from tests.spawn import run
from tools import test_dist as smoke

ROOT = Path(__file__).resolve().parents[2]
CALLS = {
    "all_reduce": "all_reduce",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "all_gather": "all_gather",
    "scatter": "scatter",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_to_all": "all_to_all_single",
    "send_recv": "batch_isend_irecv",
}


def place() -> smoke.Place:
    cpu = Device("cpu", 0, "a processor", "gloo", None)
    return smoke.Place(dist.get_rank(), dist.get_world_size(), cpu)


def right() -> list[str]:
    return smoke.check_collectives(place(), [64, 4096], 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_are_right(ranks: int) -> None:
    assert run(right, ranks) == [[]] * ranks


def idle(*_: Any, **__: Any) -> list[Any]:
    """A collective that does nothing."""
    return []


def each_broken() -> dict[str, list[str]]:
    """What this rank finds wrong where one collective after the other does nothing."""
    found = {}
    for name, call in CALLS.items():
        real: Callable[..., Any] = getattr(dist, call)
        trial = smoke.COLLECTIVES[name].trial(place(), 64)
        setattr(dist, call, idle)
        try:
            trial.run()
        finally:
            setattr(dist, call, real)
        error = smoke.wrong(name, trial, place())
        found[name] = [error] if error else []
    real = dist.barrier
    dist.barrier = idle
    error = smoke.check_barrier(place())
    dist.barrier = real
    found["barrier"] = [error] if error else []
    return found


def test_each_is_found_out_by_name_and_rank() -> None:
    said = run(each_broken, 2)
    has = {"reduce": {1}, "broadcast": {0}, "barrier": {0}}  # the ranks that see a difference
    for name in [*CALLS, "barrier"]:
        for rank in (0, 1):
            errors = said[rank][name]
            assert bool(errors) == (rank in has.get(name, {0, 1})), (name, rank, errors)
            for error in errors:
                assert error.startswith(name) and f"rank {rank}" in error


def corrupted_on_one(rank: int) -> int:
    """The status of each rank where rank `rank` gets a wrong sum, once."""
    real, here, calls = dist.all_reduce, place(), []

    def reduce(tensor: Any, *arguments: Any, **more: Any) -> Any:
        done = real(tensor, *arguments, **more)
        calls.append(1)
        if here.rank == rank and len(calls) == 1:
            tensor[3] += 1
        return done

    dist.all_reduce = reduce
    options = smoke.parse(["--sizes", "256", "--repeats", "1", "--iterations", "2"])
    ranks = Ranks(here.rank, here.rank, here.size, here.size, "torchrun")
    return smoke.run(here, ranks, options)


def test_a_wrong_value_on_one_rank_is_its_status() -> None:
    assert run(corrupted_on_one, 2, 1) == [0, 1]
    assert run(corrupted_on_one, 2, 2) == [0, 0]


def unequal() -> str:
    """What a rank says of a training in which rank 1 leaves out the mean of its gradients."""
    real, here = smoke.average, place()

    def average(tensors: Any, place: smoke.Place) -> float:
        kept = [tensor.clone() for tensor in tensors]
        mean = real(tensors, place)
        for tensor, own in zip(tensors, kept, strict=True):
            if here.rank == 1:
                tensor.copy_(own)
        return mean

    smoke.average = average
    return smoke.train(here, 2, 4, 8)[1]


def test_replicas_that_drift_are_found_out() -> None:
    first, second = run(unequal, 2)
    assert first == "" and "weights of rank 1" in second


def command(folder: Path, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    small = ["--sizes", "1024", "--repeats", "1", "--iterations", "3", "--out", str(folder / "out")]
    program = [sys.executable, str(ROOT / "tools/test_dist.py"), *small, *more]
    return subprocess.run(
        [sys.executable, "-m", "megatron.launch", "-n", str(ranks), "--", *program],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_as_a_user_starts_it(tmp_path: Path, ranks: int) -> None:
    done = command(tmp_path, ranks, "--profile", "--save-plots")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    last = ranks - 1
    for rank in range(ranks):
        assert f"[device='cpu'][rank={rank}/{last}][local_rank={rank}/{last}][node=0/0]" in lines
    for text in ("[dist_info]:", f"  - WORLD_SIZE={ranks}", "  - SCHEDULER=none", "samples of ALL"):
        assert text in done.stdout
    for name in [*smoke.COLLECTIVES, "barrier"]:
        row = next(line for line in lines if line.startswith(f"{name} "))
        assert row.endswith("right")
    steps = [line for line in lines if line.startswith("iter=")]
    assert len(steps) == 3
    for step in steps:
        figures = dict(part.split("=") for part in step.split(", "))
        assert list(figures) == ["iter", *smoke.METRICS]
        rate = float(figures["sps"]) * float(figures["dt"])
        assert abs(rate / (64 * ranks) - 1) < 1e-2  # all ranks' samples, not one's
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "profile.txt", "profile.pstats", *(f"{name}.txt" for name in smoke.METRICS)
    }  # fmt: skip
    assert "train/loss" in done.stdout


def test_options_are_few_and_explained() -> None:
    assert isinstance(smoke.parse([]), argparse.Namespace)
    with pytest.raises(SystemExit):
        smoke.parse(["--no-such-thing"])
