"""Spikes and NaN planted on one rank: all ranks decide alike, disks hold finite weights only."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.training.metrics_file import read
from tests.faults.harness import (
    LAYOUTS,
    Ended,
    committed,
    each,
    not_finite,
    started,
    steps,
    train,
)

STEPS, SPOT = 32, 26
SETTINGS = {
    "TRAIN_ITERS": str(STEPS), "LR_DECAY_ITERS": str(STEPS), "LR": "0.003", "SAVE_INTERVAL": "5",
    "SPIKE_WINDOW": "16", "SPIKE_THRESHOLD": "30", "ROLLBACK_STEPS": "6",
}  # fmt: skip
ROLLED_BACK = range(SPOT - 5, SPOT + 1)  # ROLLBACK_STEPS steps that end with the spot


@dataclass(frozen=True)
class Case:
    """What is planted on the last rank of a layout, and the policy."""

    layout: str
    kind: str
    policy: str


CASES = [
    Case(*about)
    for about in itertools.product(
        ["tp2", "pp2", "dp2", "zero3"], ["nan", "spike"], ["skip", "rollback"]
    )
] + [Case(layout, "misread", "rollback") for layout in ("tp2", "pp2", "dp2", "zero3")]
QUICK = [Case("dp2", "nan", "skip"), Case("tp2", "misread", "rollback")]


def planted(folder: Path, case: Case, data: str, **variables: str) -> tuple[Ended, list[list[str]]]:
    """A run with the fault; how it ended, and (step, applied) on each rank."""
    settings = {
        "DATA_FILE_LIST": data,
        **LAYOUTS[case.layout],
        **SETTINGS,
        "SPIKE_POLICY": case.policy,
        "FAULTS_KIND": case.kind,
        "FAULTS_STEP": str(SPOT),
        **variables,
    }
    world = int(settings["WORLD_SIZE"])
    settings["FAULTS_RANK"] = str(world - 1)
    with started(folder, hooks=["plant"], **settings) as run:
        ended = run.wait()
        notes = [run.scratch / f"applied-{rank}" for rank in range(world)]
        return ended, [note.read_text().splitlines() for note in notes]


def decided_alike(case: Case, root: Path, data: str) -> str:
    """The step is refused on all ranks, and the run passes the spot and ends whole."""
    folder = root / "-".join(vars(case).values())
    ended, applied = planted(folder, case, data)
    assert ended.status == 0, f"{ended.status}\n{ended.output}"
    assert all(rank == applied[0] for rank in applied), applied
    refused = [line for line in applied[0] if line.endswith(" 0")]
    assert refused == [f"{SPOT} 0"], refused
    assert not_finite(folder) == []
    taken, skipped = steps(folder), steps(folder, "skip")
    assert sorted(taken + skipped) == list(range(1, STEPS + 1)), (taken, skipped)
    spikes = steps(folder, "spike")
    assert spikes == [SPOT], spikes
    report = (folder / "spikes" / f"step-{SPOT}.md").read_text()
    assert "--train-range-to-skip" in report
    if case.policy == "rollback":
        assert skipped == list(ROLLED_BACK), skipped
    return ""


def test_ranks_decide_alike(data: str, tmp_path: Path) -> None:
    each(lambda case: decided_alike(case, tmp_path, data), QUICK)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ranks_decide_alike_in_every_layout(data: str, tmp_path: Path) -> None:
    each(lambda case: decided_alike(case, tmp_path, data), CASES)


def for_ever(layout: str, root: Path, data: str) -> str:
    """From the spot on every gradient is NaN: the run ends with 5 and names what is good."""
    folder = root / layout
    more = {"FAULTS_ALWAYS": "1", "MAX_BAD_STEPS": "4", "SAVE_INTERVAL": "1"}
    ended, applied = planted(folder, Case(layout, "nan", "warn"), data, **more)
    assert ended.status == 5, f"{ended.status}\n{ended.output}"
    assert all(rank == applied[0] for rank in applied), applied
    assert applied[0][-4:] == [f"{step} 0" for step in range(SPOT, SPOT + 4)], applied[0]
    assert not_finite(folder) == []
    named = re.findall(r"step-(\d{8})", ended.output)
    assert named and int(named[-1]) in committed(folder), ended.output
    return ""


@pytest.mark.long
def test_a_dead_run_ends_with_5(data: str, tmp_path: Path) -> None:
    each(lambda layout: for_ever(layout, tmp_path, data), ["one", "tp2", "pp2", "dp2", "zero3"])


@pytest.mark.parametrize(
    "layout", ["dp2", *(pytest.param(n, marks=pytest.mark.long) for n in ("one", "tp2", "pp2"))]
)
def test_weights_that_overflow_are_never_committed(layout: str, data: str, tmp_path: Path) -> None:
    """The update itself overflows; no gradient shows it before."""
    folder = tmp_path / "run"
    overflow = {"LR": "1e38", "LR_WARMUP_FRAC": "0", "MIN_LR": "0", "SAVE_INTERVAL": "2"}
    ended = train(folder, DATA_FILE_LIST=data, **LAYOUTS[layout], **overflow)
    assert ended.status == 5, ended.output
    assert not_finite(folder) == []
    again = train(folder, DATA_FILE_LIST=data, **LAYOUTS[layout], **overflow)
    assert again.status in (4, 5), again.output
    assert not_finite(folder) == []


@pytest.mark.long
def test_rollbacks_are_counted(data: str, tmp_path: Path) -> None:
    """Two spikes that one rollback cannot answer: the second ends the run with 5."""
    folder = tmp_path / "run"
    more = {"FAULTS_STEP": "19,30", "MAX_ROLLBACKS": "1"}
    ended, applied = planted(folder, Case("dp2", "spike", "rollback"), data, **more)
    assert ended.status == 5, ended.output
    assert applied[0] == applied[1]
    assert "MAX_ROLLBACKS=1" in ended.output
    assert not_finite(folder) == []
    stops = [row for row in read(folder / "metrics.jsonl") if row["event"] == "stop"]
    assert len(stops) == 1
