"""One run has one owner; a start that is refused, or has nothing to do, changes no file of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Finished
from tests.faults.harness import (
    LAYOUTS,
    committed,
    digests,
    started,
    steps,
    tensor_digests,
    train,
)


@pytest.mark.parametrize("starts", [2, pytest.param(3, marks=pytest.mark.long)])
def test_of_starts_at_once_one_runs(
    starts: int, finished: Finished, data: str, tmp_path: Path
) -> None:
    for repetition in range(1 if starts == 2 else 4):
        folder = tmp_path / f"{repetition}"
        settings = {"DATA_FILE_LIST": data, **LAYOUTS["one"]}
        # Slow enough that no start can be the only one left.
        settings |= {"hooks": ["moments"], "FAULTS_STEP_S": "0.2"}
        with (
            started(folder, **settings) as first,
            started(folder, **settings) as second,
            started(folder, **settings) if starts == 3 else started(tmp_path / "x") as third,
        ):
            runs = [first, second, third][:starts]
            ended = sorted((run.wait() for run in runs), key=lambda end: end.status)
        assert [end.status for end in ended] == [0] + [2] * (starts - 1), ended
        for refused in ended[1:]:
            assert socket.gethostname().split(".")[0] in refused.output, refused.output
            assert any(str(run.launcher.pid) in refused.output for run in runs), refused.output
        assert steps(folder) == list(range(1, 13))
        assert tensor_digests(folder, 12) == tensor_digests(finished("one"), 12)


def test_a_refused_start_changes_no_file(data: str, tmp_path: Path) -> None:
    """While a step lasts, nothing but the refused start could write."""
    folder = tmp_path / "run"
    settings = {"DATA_FILE_LIST": data, **LAYOUTS["one"]}
    with started(
        folder, hooks=["moments"], FAULTS_STEP_S="3", SAVE_INTERVAL="1", **settings
    ) as run:
        run.wait_for("step", 2)
        time.sleep(0.5)  # what belongs to step 1 is written
        before = digests(folder)
        refused = train(folder, TRAIN_ITERS="99", **settings)
        after = digests(folder)
        assert run.step() == 2, "too slow a host: another step began"
        assert refused.status == 2, refused.output
        assert str(run.launcher.pid) in refused.output, refused.output
        run.signal(signal.SIGTERM)
        assert run.wait().status == 0
    assert before == after
    assert committed(folder) == [1, 2]


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        pytest.param({}, 0, id="nothing to do"),
        pytest.param({"HIDDEN": "64"}, 2, id="another model"),
        pytest.param({"OPT": "sgd"}, 2, id="another optimizer", marks=pytest.mark.long),
        pytest.param({"DATA_FILE_LIST": "/nowhere/list.txt"}, 3, id="no data"),
        pytest.param({"SEQ": "32"}, 2, id="another length", marks=pytest.mark.long),
        pytest.param({"VAL_SPLIT": "99"}, 3, id="other data", marks=pytest.mark.long),
        pytest.param(
            {"TRAIN_RANGE_TO_SKIP": "3 4"}, 2, id="a passed range", marks=pytest.mark.long
        ),
    ],
)
def test_a_start_without_a_step_changes_no_file(
    settings: dict[str, str], status: int, finished: Finished, data: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished("one"), folder)
    before = {path: os.stat(folder / path).st_mtime_ns for path in digests(folder)}
    hashes = digests(folder)
    more = {"TRAIN_ITERS": "14"} if settings else {}
    ended = train(folder, **{"DATA_FILE_LIST": data, **LAYOUTS["one"], **more, **settings})
    assert ended.status == status, ended.output
    assert digests(folder) == hashes, ended.output
    assert before == {path: os.stat(folder / path).st_mtime_ns for path in digests(folder)}


@pytest.mark.long
def test_every_start_is_kept(finished: Finished, data: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished("one"), folder)
    kept = len(list((folder / "starts").iterdir()))
    assert kept == 1
    ended = train(folder, TRAIN_ITERS="14", DATA_FILE_LIST=data, **LAYOUTS["one"])
    assert ended.status == 0, ended.output
    assert len(list((folder / "starts").iterdir())) == 2
    assert "14" in (folder / "run.json").read_text()


@pytest.mark.long
@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_a_dead_owner_is_taken_over(
    victim: str, finished: Finished, data: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = {"DATA_FILE_LIST": data, **LAYOUTS["one"]}
    with started(folder, hooks=["moments"], FAULTS_STEP_S="0.1", **settings) as run:
        run.wait_for("step", 6)
        owner = run.launcher.pid
        run.signal(signal.SIGKILL, None if victim == "launcher" else 0)
        run.wait()
    ended = train(folder, **settings)
    assert ended.status == 0, ended.output
    if victim == "launcher":  # the launcher of a dead rank gives the claim back
        assert str(owner) in ended.output, f"the take-over is not said:\n{ended.output}"
    assert steps(folder) == list(range(1, 13))
    assert tensor_digests(folder, 12) == tensor_digests(finished("one"), 12)


def test_leftovers_of_dead_starts_are_removed(
    finished: Finished, data: str, tmp_path: Path
) -> None:
    """Also those of a step that this start never saves."""
    folder = tmp_path / "run"
    shutil.copytree(finished("one"), folder)
    for name in ("step-00000007.tmp", "step-00000007.tmp.other-host-4242-1"):
        left = folder / "checkpoints" / name
        left.mkdir()
        (left / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    ended = train(folder, TRAIN_ITERS="14", DATA_FILE_LIST=data, **LAYOUTS["one"])
    assert ended.status == 0, ended.output
    assert not list((folder / "checkpoints").glob("*.tmp*"))
    assert committed(folder) == [4, 8, 12, 14]


def test_a_run_goes_on_by_its_own_configuration(
    finished: Finished, data: str, tmp_path: Path
) -> None:
    """--resume RUN takes the run's settings, with the changes given beside it."""
    folder = tmp_path / "run"
    shutil.copytree(finished("one"), folder)
    bare = {"RUN_DIR": "", "WANDB_MODE": "disabled"}
    ended = train(folder, "--resume", str(folder), tiny={}, TRAIN_ITERS="14", **bare)
    assert ended.status == 0, ended.output
    assert steps(folder) == list(range(1, 15))
    assert "resumed from" in ended.output
