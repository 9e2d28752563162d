"""The harness: results in order, the first failure with its rank, nothing left running."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.spawn import RankError, run


def add_rank(offset: int) -> int:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    assert int(os.environ["RANK"]) == int(os.environ["LOCAL_RANK"]) == dist.get_rank()
    return int(total) * 10 + dist.get_rank()


def surroundings() -> tuple[int, bool, bool, str]:
    return (
        torch.get_num_threads(),
        bool(torch.tensor([1e-310], dtype=torch.float64) * 1 == 0),
        "deepspeed" in sys.modules,
        os.environ.get("A_VARIABLE", ""),
    )


def fail_on(rank: int) -> None:
    print(f"this is rank {dist.get_rank()}")
    if dist.get_rank() == rank:
        raise ArithmeticError(f"rank {rank} cannot")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), 9)
    time.sleep(60)


def sleep_with_child(folder: str) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    (Path(folder) / f"{dist.get_rank()}").write_text(f"{os.getpid()} {pid}")
    time.sleep(60)


def leave_a_child() -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid


def large(size: int) -> torch.Tensor:
    return torch.full((size,), float(dist.get_rank()))


def test_results_come_back_in_rank_order() -> None:
    assert run(add_rank, 3, 1) == [60, 61, 62]
    assert run(add_rank, 1, 7) == [70]


def test_a_rank_has_one_thread_no_denormals_deepspeed_and_its_environment() -> None:
    assert run(surroundings, 1, environ={"A_VARIABLE": "x"}) == [(1, True, True, "x")]
    assert run(surroundings, 1) == [(1, True, True, "")]


def test_large_results() -> None:
    first, second = run(large, 2, 1_000_000)
    assert first.sum() == 0 and second.sum() == 1_000_000


@pytest.mark.flaky(reruns=1)
def test_the_first_failing_rank_is_named_with_its_traceback_and_output() -> None:
    start = time.monotonic()
    with pytest.raises(
        RankError, match=r"(?s)rank 1 of 3.*fail_on.*rank 1 cannot.*this is rank 1"
    ) as error:
        run(fail_on, 3, 1)
    assert error.value.rank == 1
    assert time.monotonic() - start < 20


@pytest.mark.flaky(reruns=1)
def test_a_killed_rank_is_named_and_the_others_are_ended() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of 2: died of signal 9"):
        run(die_on, 2, 0)
    assert time.monotonic() - start < 20


def test_a_hang_ends_at_the_timeout_with_stacks_and_no_process_left(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)no end after 2 s.*sleep_with_child"):
        run(sleep_with_child, 2, str(tmp_path), timeout=2)
    for rank in range(2):
        for pid in (tmp_path / f"{rank}").read_text().split():
            assert _is_gone(int(pid))


def test_what_a_rank_started_ends_with_it() -> None:
    assert all(_is_gone(pid) for pid in run(leave_a_child, 2))


def test_a_lambda_is_refused_and_the_next_case_works() -> None:
    with pytest.raises(TypeError, match="picklable"):
        run(lambda: None, 1)
    assert run(add_rank, 1, 0) == [0]


def _is_gone(pid: int) -> bool:
    """A killed grandchild is reaped by init; where nothing reaps, it stays a zombie."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False
