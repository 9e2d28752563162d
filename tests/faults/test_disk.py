"""A disk that is full: said, never the end of a run, and a status that does not flatter."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import Finished
from tests.faults.harness import LAYOUTS, Started, committed, started, steps, tensor_digests, train

NOT_ON_DISK = 6
STEPS = 12
SIZE = "24m"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not one byte is left meanwhile."""
    ballast = disk / "ballast"
    with open(ballast, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    try:
        yield
    finally:
        ballast.unlink()


def until(run: Started, step: int) -> None:
    """Waits for a step that has not been taken when this returns."""
    run.wait_for("step", step)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_a_full_disk_in_the_middle(layout: str, finished: Finished, disk: Path, data: str) -> None:
    """The save of step 4 fails and is said; those after it, with space again, are whole."""
    folder = disk / "run"
    settings = {"DATA_FILE_LIST": data, "FAULTS_STEP_S": "0.3", **LAYOUTS[layout]}
    with started(folder, hooks=["moments"], **settings) as run:
        until(run, 3)
        with full(disk):
            until(run, 6)
        ended = run.wait()
    assert ended.status == 0, ended.output
    assert "step 4 was not saved" in ended.output, ended.output
    assert committed(folder) == [8, 12]
    assert not list((folder / "checkpoints").glob("*.tmp*"))
    assert tensor_digests(folder, STEPS) == tensor_digests(finished(layout), STEPS)
    # What could not be written to metrics.jsonl was kept until it could.
    assert steps(folder) == list(range(1, STEPS + 1))


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", ["0", "1"])
@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_a_full_disk_at_the_last_save(
    layout: str, asynchronous: str, finished: Finished, disk: Path, data: str
) -> None:
    folder = disk / "run"
    settings = {
        "DATA_FILE_LIST": data,
        "FAULTS_STEP_S": "0.3",
        "ASYNC_SAVE": asynchronous,
        **LAYOUTS[layout],
    }
    with started(folder, hooks=["moments"], **settings) as run:
        until(run, 11)
        assert committed(folder) == [4, 8], "a save behind the steps takes three of them"
        with full(disk):
            ended = run.wait()
    assert ended.status == NOT_ON_DISK, f"{ended.status}\n{ended.output}"
    assert "12" in ended.last_line and "8" in ended.last_line, ended.last_line
    assert committed(folder) == [4, 8]
    again = train(folder, **settings)
    assert again.status == 0, again.output
    assert tensor_digests(folder, STEPS) == tensor_digests(finished(layout), STEPS)
    assert steps(folder) == list(range(1, STEPS + 1))


@pytest.mark.long
def test_a_disk_that_stays_full_ends_no_run(disk: Path, data: str) -> None:
    """Neither output.log nor metrics.jsonl nor any save can grow: all steps are taken."""
    folder = disk / "run"
    settings = {"DATA_FILE_LIST": data, "FAULTS_STEP_S": "0.1", "TRAIN_ITERS": "20"}
    with started(folder, hooks=["moments"], **settings, **LAYOUTS["tp2"]) as run:
        until(run, 2)
        with full(disk):
            ended = run.wait()
    assert ended.status == NOT_ON_DISK, f"{ended.status}\n{ended.output}"
    assert "iteration=      20/      20" in ended.output
    assert "output.log" in ended.output, "not said"
    assert committed(folder) == []


def test_files_of_a_rank_that_cannot_grow(data: str, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: where nothing can be mounted."""
    ended = train(
        tmp_path / "run",
        hooks=["limit_files"],
        FAULTS_FSIZE="20000",
        DATA_FILE_LIST=data,
        **LAYOUTS["one"],
    )
    assert ended.status == NOT_ON_DISK, f"{ended.status}\n{ended.output}"
    assert committed(tmp_path / "run") == []
    assert steps(tmp_path / "run") == list(range(1, STEPS + 1))
    assert os.path.getsize(tmp_path / "run" / "output.log") > 0


@pytest.mark.long
def test_a_signal_on_a_full_disk_is_not_saved(disk: Path, data: str) -> None:
    """Asked to stop, and nothing to show for it: not 0."""
    import signal

    folder = disk / "run"
    settings = {"DATA_FILE_LIST": data, "FAULTS_STEP_S": "0.2", "TRAIN_ITERS": "100000"}
    with started(folder, hooks=["moments"], SAVE_INTERVAL="0", **settings, **LAYOUTS["one"]) as run:
        until(run, 3)
        with full(disk):
            run.signal(signal.SIGTERM)
            ended = run.wait()
    assert ended.status == NOT_ON_DISK, f"{ended.status}\n{ended.output}"
    assert committed(folder) == []
