"""kill -9 at any moment, saves included: later starts end with the bits of a run never killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Finished
from tests.faults.harness import (
    LAYOUTS,
    committed,
    each,
    started,
    steps,
    tensor_digests,
    train,
)

STEPS = 12
LATEST_S = 0.1  # after a step began: into the steps after it, or their saves


def killed_twice(folder: Path, data: str, layout: str, asynchronous: str, seed: int) -> str:
    """Two starts killed, the second after its first step; then one to the end.

    Odd seeds kill some time after a random step began, even ones at a random write below the
    checkpoint folder. Returns what is wrong; "" where nothing is.
    """
    rng = random.Random(seed)
    settings = {
        **LAYOUTS[layout],
        "DATA_FILE_LIST": data,
        "SAVE_INTERVAL": "1",
        "ASYNC_SAVE": asynchronous,
    }
    world, killed = int(settings["WORLD_SIZE"]), 0
    for number in range(2):
        before = committed(folder)
        if seed % 2:
            victim = rng.randrange(world)
            with started(folder, hooks=["moments"], **settings) as run:
                run.pid(victim)
                run.wait_for("step", rng.randint(1, STEPS))
                time.sleep(rng.uniform(0.0, LATEST_S))
                run.signal(signal.SIGKILL, victim)
                ended = run.wait()
            assert ended.status in (137, 0), f"start {number}: {ended.status}\n{ended.output}"
        else:
            # Rank 0 makes the folder, writes the manifest and renames both: it has most moments.
            hooks = ["die_at_file_event"]
            about = {"FAULTS_RANK": "0", "FAULTS_EVENT": str(rng.randint(1, 40))}
            ended = train(folder, hooks=hooks, **settings, **about)
            assert ended.status in (137, 0), f"start {number}: {ended.status}\n{ended.output}"
        killed += ended.status == 137
        if before:
            assert f"step-{before[-1]:08d}" in ended.output or "resumed" not in ended.output
        assert set(before) <= set(committed(folder)), "a committed step is gone"
    assert killed, "no start was killed"
    ended = train(folder, **settings)
    assert ended.status == 0, ended.output
    assert steps(folder) == list(range(1, STEPS + 1))
    assert committed(folder) == list(range(1, STEPS + 1))
    left = [path.name for path in (folder / "checkpoints").glob("step-*") if "." in path.name]
    assert not left, f"left behind, or found damaged: {left}"
    return ""


QUICK = [("one", "0", 2), ("one", "1", 4)]
LONG = [
    (layout, asynchronous, 100 * number + seed)
    for number, layout in enumerate(["one", "tp2", "pp2", "dp2", "tp2-pp2"])
    for asynchronous in ("0", "1")
    for seed in (range(1, 4) if layout != "tp2-pp2" else range(1, 5))
]


def check(cases: list[tuple[str, str, int]], data: str, finished: Finished, root: Path) -> None:
    """Each case against the run that was never killed nor saved asynchronously."""
    whole = {layout: tensor_digests(finished(layout), STEPS) for layout, _, _ in cases}

    def case(about: tuple[str, str, int]) -> str:
        folder = root / "-".join(map(str, about))
        killed_twice(folder, data, *about)
        same = tensor_digests(folder, STEPS) == whole[about[0]]
        return "" if same else "the last step differs from the run never killed"

    each(case, cases)


def test_some_kills(data: str, finished: Finished, tmp_path: Path) -> None:
    check(QUICK, data, finished, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_kills_in_every_layout(data: str, finished: Finished, tmp_path: Path) -> None:
    assert len(LONG) >= 30
    check(LONG, data, finished, tmp_path)
