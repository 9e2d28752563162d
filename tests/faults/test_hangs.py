"""A rank that stands still: seen in time, named with phase and stacks; a retry ends the run whole.

And of a rank that fails, the error is the last thing on the screen, whichever rank it was.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from megatron.data.indexed import IndexedWriter
from tests.faults.conftest import Finished
from tests.faults.harness import (
    LAYOUTS,
    each,
    started,
    steps,
    tensor_digests,
    train,
)
from tests.faults.test_signals import load

LIMIT_S = 5
HEARD_S = 1.5  # a rank says once a second what it does; before the first step the limit is 1800 s
GRACE_S = 15  # stacks, SIGTERM, SIGKILL
HUNG = 124

STOPPED = [
    ("tp2", 1, "step"),
    ("dp2", 0, "step"),
    ("pp2", 1, "step"),
    ("one", 0, "step"),
    ("zero3", 1, "save"),
    ("tp2", 1, "evaluate"),
]
SLOW = {
    "step": {"FAULTS_STEP_S": "0.5"},
    "save": {"FAULTS_STEP_S": "0.5", "FAULTS_SAVE_S": "3", "SAVE_INTERVAL": "4"},
    "evaluate": {"FAULTS_STEP_S": "0.5", "EVAL_INTERVAL": "4", "EVAL_ITERS": "100000"},
}


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stopped(layout: str, rank: int, moment: str, root: Path, data: str) -> str:
    """SIGSTOP for a rank at a moment; returns what is wrong with what follows."""
    folder = root / f"{layout}-{rank}-{moment}"
    settings = {
        "DATA_FILE_LIST": data,
        "TRAIN_ITERS": "1000000",
        "LOG_INTERVAL": "1000",
        "HANG_TIMEOUT": str(LIMIT_S),
        **LAYOUTS[layout],
        **SLOW[moment],
    }
    world = int(settings["WORLD_SIZE"])
    with started(folder, hooks=["moments"], **settings) as run:
        run.wait_for(moment, 2 if moment == "step" else 0)
        time.sleep(HEARD_S)
        pids = [run.pid(number) for number in range(world)]
        began = time.monotonic()
        run.signal(signal.SIGSTOP, rank)
        ended = run.wait()
        seconds = time.monotonic() - began
    assert ended.status == HUNG, f"{ended.status}\n{ended.output}"
    limit = (LIMIT_S + GRACE_S) * load()
    assert LIMIT_S * 0.8 <= seconds <= limit, f"{seconds:.1f} s, allowed {limit:.1f}"
    assert f"rank {rank}" in ended.output, ended.output
    assert re.search(rf"rank {rank}\b.*\b{moment}", ended.output), ended.output
    if world > 1:  # a stopped process answers nothing: the stacks are those of its peers
        assert re.search(r'File ".+", line \d+ in ', ended.output), f"no stacks:\n{ended.output}"
    assert not [pid for pid in pids if alive(pid)], "a rank is left"
    return ""


@pytest.mark.flaky(reruns=1)
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_rank_stopped_at_any_moment(data: str, tmp_path: Path) -> None:
    each(lambda about: stopped(*about, tmp_path, data), STOPPED)


@pytest.mark.long
def test_the_stacks_show_where_a_rank_stands(data: str, tmp_path: Path) -> None:
    ended = train(
        tmp_path / "run",
        hooks=["hang"],
        FAULTS_RANK="1",
        FAULTS_STEP="3",
        HANG_TIMEOUT=str(LIMIT_S),
        DATA_FILE_LIST=data,
        **LAYOUTS["dp2"],
    )
    assert ended.status == HUNG, ended.output
    # The function that sleeps, and the collective that the other rank waits in.
    assert re.search(r"rank 1 in step 3: stand_still", ended.output), ended.output
    assert re.search(
        r"rank 0 in step 3: reduce_scatter of gradients, called at megatron/engine/", ended.output
    ), ended.output
    stacks = "".join(path.read_text() for path in (tmp_path / "run" / "hangs").rglob("*.txt"))
    assert "stand_still" in stacks and "wait_for" in stacks, stacks


@pytest.mark.long
@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_a_retry_ends_the_run_whole(
    layout: str, finished: Finished, data: str, tmp_path: Path
) -> None:
    ended = train(
        tmp_path / "run",
        hooks=["hang"],
        FAULTS_RANK="1",
        FAULTS_STEP="6",
        HANG_TIMEOUT=str(LIMIT_S),
        RETRIES="1",
        DATA_FILE_LIST=data,
        **LAYOUTS[layout],
    )
    assert ended.status == 0, ended.output
    assert steps(tmp_path / "run") == list(range(1, 13))
    assert tensor_digests(tmp_path / "run", 12) == tensor_digests(finished(layout), 12)


@pytest.mark.long
def test_retries_end_with_the_status_of_the_last(data: str, tmp_path: Path) -> None:
    """A failure that comes back each time; a wrong setting is not tried again."""
    ended = train(
        tmp_path / "run",
        hooks=["fail"],
        FAULTS_RANK="0",
        FAULTS_STEP="6",
        FAULTS_ALWAYS="1",
        RETRIES="1",
        DATA_FILE_LIST=data,
        **LAYOUTS["one"],
    )
    assert ended.status == 1, ended.output
    assert ended.output.count("resumed from") == 1
    assert ended.last_line == "RuntimeError: planted in rank 0"
    wrong = train(
        tmp_path / "run", RETRIES="1", DATA_FILE_LIST=data, **{**LAYOUTS["one"], "HIDDEN": "64"}
    )
    assert wrong.status == 2, wrong.output
    assert wrong.output.count("launch command") <= 1


def failing_rank(rank: int, root: Path, data: str) -> str:
    """A rank raises: its error is the last line."""
    ended = train(
        root / f"{rank}",
        hooks=["fail"],
        FAULTS_RANK=str(rank),
        FAULTS_STEP="3",
        DATA_FILE_LIST=data,
        **LAYOUTS["dp2"],
    )
    assert ended.status == 1, f"{ended.status}\n{ended.output}"
    assert ended.last_line == f"RuntimeError: planted in rank {rank}", ended.output
    return ""


def test_the_failing_rank_has_the_last_word(data: str, tmp_path: Path) -> None:
    each(lambda rank: failing_rank(rank, tmp_path, data), [0, 1])


def cut_while_training(seed: int, root: Path) -> str:
    """The end of a data file is cut under a DP2 run; whichever rank reads there first says so."""
    import numpy as np

    folder = root / f"{seed}"
    folder.mkdir()
    prefix = folder / "numbers"
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for _ in range(400):
            writer.add_document(np.arange(40, dtype=np.uint16))
    (folder / "list.txt").write_text(f"1 {prefix} numbers\n")
    settings = {
        "DATA_FILE_LIST": str(folder / "list.txt"),
        "TRAIN_ITERS": "1000000",
        "SEED": str(seed),
        **LAYOUTS["dp2"],
    }
    with started(folder / "run", hooks=["moments"], FAULTS_STEP_S="0.02", **settings) as run:
        run.wait_for("step", 2)
        size = os.path.getsize(f"{prefix}.bin")
        os.truncate(f"{prefix}.bin", size // 2)
        ended = run.wait()
    assert ended.status == 3, f"{ended.status}\n{ended.output}"
    words = ended.output.rpartition("failed with")[2] or ended.output
    assert f"{prefix}.bin" in "\n".join(ended.output.strip().splitlines()[-6:]), ended.output
    assert "Traceback" not in words, ended.output
    return ""


def test_a_data_error_is_the_last_word(tmp_path: Path) -> None:
    each(lambda seed: cut_while_training(seed, tmp_path), range(2))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_data_error_is_the_last_word_20_of_20(tmp_path: Path) -> None:
    each(lambda seed: cut_while_training(seed, tmp_path), range(20))


@pytest.mark.long
def test_nothing_is_left_of_a_killed_launcher(data: str, tmp_path: Path) -> None:
    with started(
        tmp_path / "run", hooks=["moments"], DATA_FILE_LIST=data, TRAIN_ITERS="1000000",
        **LAYOUTS["dp2"],
    ) as run:  # fmt: skip
        run.wait_for("step", 2)
        pids = [run.pid(0), run.pid(1)]
        run.signal(signal.SIGKILL)
        run.wait()
        until = time.monotonic() + 5 * load()
        while any(map(alive, pids)):
            assert time.monotonic() < until, "ranks are left"
            time.sleep(0.05)
