"""Saves behind the steps and what is kept of them, in runs that are killed meanwhile, too."""

from __future__ import annotations

import os
import random
import signal
import stat
import time
from pathlib import Path

import pytest

from megatron.training.metrics_file import read
from tests.faults.conftest import Finished
from tests.faults.harness import (
    LAYOUTS,
    committed,
    each,
    started,
    step_folder,
    steps,
    tensor_digests,
    train,
)

STEPS = 12


@pytest.mark.flaky(reruns=1)
@pytest.mark.long
def test_a_save_behind_the_steps_holds_them_shortly_and_has_the_same_bytes(
    finished: Finished, data: str, tmp_path: Path
) -> None:
    """Every file's flush takes 0.15 s, a save a second; the steps go on meanwhile."""
    folder = tmp_path / "run"
    slow = {"hooks": ["moments"], "FAULTS_SAVE_S": "0.15", "FAULTS_STEP_S": "0.4"}
    ended = train(folder, ASYNC_SAVE="1", DATA_FILE_LIST=data, **LAYOUTS["one"], **slow)
    assert ended.status == 0, ended.output
    for step in (4, 8, 12):
        assert tensor_digests(folder, step) == tensor_digests(finished("one"), step)
    saves = [row for row in read(folder / "metrics.jsonl") if row["event"] == "save"]
    assert [save["iteration"] for save in saves] == [4, 8, 12]
    for save in saves[:-1]:  # the end of the run waits for the last one
        assert save["elapsed_s"] >= 0.15
        assert save["held_s"] < save["elapsed_s"] / 3, save


@pytest.mark.long
def test_what_is_kept(data: str, tmp_path: Path) -> None:
    """The newest two, and every sixth."""
    keep = {"SAVE_INTERVAL": "1", "KEEP_LAST": "2", "KEEP_EVERY": "6"}
    ended = train(tmp_path / "run", DATA_FILE_LIST=data, **LAYOUTS["dp2"], **keep)
    assert ended.status == 0, ended.output
    assert committed(tmp_path / "run") == [6, 11, 12]
    for path in step_folder(tmp_path / "run", 12).iterdir():
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == 0o666 & ~_umask(), f"{path.name}: {mode:o}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def killed_while_removing(seed: int, root: Path, data: str, finished: Finished) -> str:
    """One step is kept: two starts killed at a write or removal, then one to the end."""
    folder, rng = root / f"{seed}", random.Random(seed)
    keep = {"SAVE_INTERVAL": "1", "KEEP_LAST": "1", "ASYNC_SAVE": str(seed % 2)}
    settings = {"DATA_FILE_LIST": data, **LAYOUTS["one"], **keep}
    hooks = ["die_at_file_event"]
    for _ in range(2):
        about = {"FAULTS_RANK": "0", "FAULTS_EVENT": str(rng.randint(15, 60))}
        ended = train(folder, hooks=hooks, **settings, **about)
        assert ended.status == 137, f"{ended.status}\n{ended.output}"
        assert committed(folder), "the only step is gone"
    ended = train(folder, **settings)
    assert ended.status == 0, ended.output
    assert steps(folder) == list(range(1, STEPS + 1))
    left = [path.name for path in (folder / "checkpoints").glob("step-*")]
    assert left == [f"step-{STEPS:08d}"], left
    same = tensor_digests(folder, STEPS) == tensor_digests(finished("one"), STEPS)
    return "" if same else "the last step differs from the run never killed"


@pytest.mark.long
def test_the_newest_step_outlives_a_kill_while_others_are_removed(
    finished: Finished, data: str, tmp_path: Path
) -> None:
    finished("one")
    each(lambda seed: killed_while_removing(seed, tmp_path, data, finished), range(8))


@pytest.mark.long
@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_a_retry_after_a_killed_rank_ends_the_run_whole(
    layout: str, finished: Finished, data: str, tmp_path: Path
) -> None:
    """RETRIES and a save in flight: the next ranks resume from what is committed."""
    folder = tmp_path / "run"
    settings = {"RETRIES": "2", "ASYNC_SAVE": "1", "SAVE_INTERVAL": "1", "FAULTS_STEP_S": "0.05"}
    settings |= {"DATA_FILE_LIST": data, **LAYOUTS[layout]}
    with started(folder, hooks=["moments"], **settings) as run:
        run.wait_for("step", 4)
        time.sleep(0.02)
        run.signal(signal.SIGKILL, int(settings["WORLD_SIZE"]) - 1)
        ended = run.wait()
    assert ended.status == 0, ended.output
    assert steps(folder) == list(range(1, STEPS + 1))
    assert tensor_digests(folder, STEPS) == tensor_digests(finished(layout), STEPS)
