"""Spikes and what is not finite, in whole runs: same decision on all ranks, right status."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import store
from megatron.training.metrics_file import read
from tests.e2e.recorded import train_recorded, write_data
from tests.e2e.unstable import (
    BATCH,
    SETTINGS,
    SPIKE,
    STEPS,
    contents,
    train_poisoned,
    write_spiked_data,
)
from tests.spawn import run

LAYOUTS = {
    "one": {},
    "tp2": {"TP": "2"},
    "pp2": {"PP": "2"},
    "dp2": {"WORLD_SIZE": "2"},
    "zero3": {"WORLD_SIZE": "2", "ZERO_STAGE": "3"},
}
OTHERS = {
    "muon": {"WORLD_SIZE": "2", "OPT": "muon"},
    "schedule-free": {"WORLD_SIZE": "2", "OPT": "adamwschedulefree"},
    "sophiag": {"WORLD_SIZE": "2", "OPT": "sophiag"},
    "bf16": {"WORLD_SIZE": "2", "DTYPE": "bf16", "LR": "0.003"},
    "fp16": {"WORLD_SIZE": "2", "DTYPE": "fp16", "LR": "0.003"},
    "host": {"WORLD_SIZE": "2", "ZERO_STAGE": "2", "CPU_OPTIMIZER": "1"},
    "async": {"WORLD_SIZE": "2", "ASYNC_SAVE": "1", "KEEP_LAST": "8"},
}
"""Optimizers, or places of them, that a rollback must put back; a save behind the steps."""
ROLLED_BACK = f"{SPIKE - 5} {SPIKE}"  # ROLLBACK_STEPS=6 steps that end with the spike


def train(folder: Path, layout: str, name: str, poison: int = 0, **variables: str) -> list[Any]:
    """A run on the spiked data, whatever its status."""
    path = folder / "list.txt"
    settings = {
        **SETTINGS,
        **(LAYOUTS | OTHERS)[layout],
        "DATA_FILE_LIST": str(path),
        "RUN_DIR": str(folder / name),
        **variables,
    }
    world = 1 if layout == "one" else 2
    if poison:
        return run(train_poisoned, world, settings, poison, timeout=120)
    return run(train_recorded, world, settings, timeout=120)


def statuses(recordings: list[Any]) -> set[int]:
    return {recording.status for recording in recordings}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit, and finite."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        assert value.isfinite().all(), name


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in read(folder / "metrics.jsonl") if record["event"] == event]


@pytest.mark.parametrize(
    "layout",
    ["one", *(pytest.param(n, marks=pytest.mark.long) for n in ("tp2", "pp2", "dp2", "zero3"))],
)
def test_a_refused_spike_is_a_step_that_was_skipped(layout: str, tmp_path: Path) -> None:
    write_spiked_data(tmp_path)
    expected = train(tmp_path, layout, "expected", TRAIN_RANGE_TO_SKIP=f"{SPIKE} {SPIKE}")
    found = train(tmp_path, layout, "found", SPIKE_POLICY="skip")
    assert statuses(expected) == statuses(found) == {0}
    assert_same(contents(tmp_path / "found")[STEPS], contents(tmp_path / "expected")[STEPS])
    (spike,) = records(tmp_path / "found", "spike")
    assert spike["iteration"] == SPIKE and spike["action"] == "update refused"
    assert spike["z_loss"] > 8 and spike["window"] == 16
    state = store.committed(tmp_path / "found" / "checkpoints")[0].manifest["state"]
    assert state["iteration"] == STEPS and state["skipped_iterations"] == 1


@pytest.mark.parametrize(
    "layout",
    [
        "one",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("tp2", "pp2", "dp2", "zero3", *OTHERS)),
    ],
)
def test_a_rollback_is_a_run_that_skipped_the_suspect_steps(layout: str, tmp_path: Path) -> None:
    write_spiked_data(tmp_path)
    expected = train(tmp_path, layout, "expected", TRAIN_RANGE_TO_SKIP=ROLLED_BACK)
    found = train(tmp_path, layout, "found", SPIKE_POLICY="rollback")
    assert statuses(expected) == statuses(found) == {0}
    one, other = contents(tmp_path / "found"), contents(tmp_path / "expected")
    assert one.keys() == other.keys() == set(range(5, STEPS + 1, 5))
    for step in one:
        assert_same(one[step], other[step])
    last = store.committed(tmp_path / "found" / "checkpoints")[0].manifest["state"]
    assert last["skip_ranges"] == [[SPIKE - 5, SPIKE]] and last["rollbacks"] == 1
    (aside,) = (tmp_path / "found" / "checkpoints").glob("step-00000025.rolled-back-*")
    assert (aside / "manifest.json").is_file()
    # The record of the run is that of the steps that count.
    events = read(tmp_path / "found" / "metrics.jsonl")
    steps = [r["iteration"] for r in events if r["event"] in ("step", "skip")]
    assert steps == list(range(1, STEPS + 1))
    (rollback,) = records(tmp_path / "found", "rollback")
    assert rollback["iteration"] == 20 and rollback["spike"] == SPIKE
    (spike,) = records(tmp_path / "found", "spike")
    assert spike["action"] == f"rollback to step 20, steps {SPIKE - 5}-{SPIKE} skipped"


@pytest.mark.parametrize(
    ("layout", "policy", "skipped"),
    [
        ("one", "warn", "22 22"),
        *(
            pytest.param(layout, "rollback", "17 22", marks=pytest.mark.long)
            for layout in ("tp2", "pp2", "dp2", "zero3")
        ),
        *(
            pytest.param(layout, policy, "22 22", marks=pytest.mark.long)
            for layout in ("tp2", "pp2", "dp2", "zero3")
            for policy in ("warn", "skip")
        ),
    ],
)
def test_a_nan_on_one_rank_is_as_a_spike(
    layout: str, policy: str, skipped: str, tmp_path: Path
) -> None:
    write_spiked_data(tmp_path)
    short = {"TRAIN_ITERS": "25"}
    expected = train(tmp_path, layout, "expected", TRAIN_RANGE_TO_SKIP=skipped, **short)
    found = train(tmp_path, layout, "found", poison=22, SPIKE_POLICY=policy, **short)
    assert statuses(expected) == statuses(found) == {0}
    assert_same(contents(tmp_path / "found")[25], contents(tmp_path / "expected")[25])
    (spike,) = records(tmp_path / "found", "spike")
    assert spike["iteration"] == 22 and spike["z_grad_norm"] == float("inf")


@pytest.mark.long
def test_a_warning_names_the_suspects_and_changes_nothing(tmp_path: Path) -> None:
    write_spiked_data(tmp_path)
    for policy in ("off", "warn"):
        found = train(tmp_path, "one", policy, SPIKE_POLICY=policy, LOG_INTERVAL="7")
        assert statuses(found) == {0}
    assert_same(contents(tmp_path / "warn")[STEPS], contents(tmp_path / "off")[STEPS])
    assert records(tmp_path / "off", "spike") == []
    assert not (tmp_path / "off" / "spikes").exists()
    spikes = records(tmp_path / "warn", "spike")
    assert spikes[0]["iteration"] == SPIKE and spikes[0]["action"] == "none (SPIKE_POLICY=warn)"
    text = (tmp_path / "warn" / "spikes" / f"step-{SPIKE}.md").read_text()
    for sample in range((SPIKE - 1) * BATCH, SPIKE * BATCH):
        assert f"- sample {sample}: corpus corpus, file {tmp_path / 'text'}, epoch 0" in text
    assert text.count("  documents ") == BATCH
    assert f"--train-range-to-skip {SPIKE} {SPIKE}" in text and "Window: 16 steps" in text


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    write_spiked_data(tmp_path)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "spikes").write_text("a file where the folder belongs")
    assert statuses(train(tmp_path, "one", "found", SPIKE_POLICY="skip")) == {0}
    (spike,) = records(tmp_path / "found", "spike")
    assert spike["iteration"] == SPIKE and spike["report"] is None


@pytest.mark.long
def test_a_resume_after_a_rollback_keeps_its_range(tmp_path: Path) -> None:
    """Killed after it, so that the checkpoint holds range and count."""
    write_spiked_data(tmp_path)
    cut = {"TRAIN_ITERS": "32", "LR_DECAY_ITERS": str(STEPS), "SPIKE_POLICY": "rollback"}
    expected = train(tmp_path, "one", "expected", TRAIN_RANGE_TO_SKIP=ROLLED_BACK)
    first = train(tmp_path, "one", "found", **cut)
    second = train(tmp_path, "one", "found", SPIKE_POLICY="rollback")
    assert statuses(expected + first + second) == {0}
    assert_same(contents(tmp_path / "found")[STEPS], contents(tmp_path / "expected")[STEPS])
    assert (
        store.committed(tmp_path / "found" / "checkpoints")[0].manifest["state"]["rollbacks"] == 1
    )


def train_with_stuck_folders(settings: dict[str, str]) -> Any:
    """Trains where a checkpoint's folder cannot be renamed."""

    def move_aside(folder: Path, why: str) -> Path:
        raise PermissionError(f"{folder} stays")

    store.move_aside = move_aside
    return train_recorded(settings)


@pytest.mark.long
def test_where_a_later_checkpoint_cannot_be_set_aside_the_step_is_skipped(tmp_path: Path) -> None:
    """A checkpoint of undone steps that stays would be taken by the next resume."""
    write_spiked_data(tmp_path)
    settings = {
        **SETTINGS, "WORLD_SIZE": "2", "DATA_FILE_LIST": str(tmp_path / "list.txt"),
        "RUN_DIR": str(tmp_path / "found"), "SPIKE_POLICY": "rollback",
    }  # fmt: skip
    assert statuses(run(train_with_stuck_folders, 2, settings)) == {0}
    last = store.committed(tmp_path / "found" / "checkpoints")[0].manifest["state"]
    assert last["skip_ranges"] == [[SPIKE, SPIKE]] and last["rollbacks"] == 0
    (spike,) = records(tmp_path / "found", "spike")
    assert "step-00000025 stays" in spike["action"]


@pytest.mark.long
def test_garbage_over_steps_costs_one_rollback(tmp_path: Path) -> None:
    """After it a rollback would undo nothing: what is before the next spike is skipped already."""
    write_spiked_data(tmp_path, steps=3)
    expected = train(tmp_path, "one", "expected", TRAIN_RANGE_TO_SKIP=f"{SPIKE - 5} {SPIKE + 2}")
    found = train(tmp_path, "one", "found", SPIKE_POLICY="rollback")
    assert statuses(expected + found) == {0}
    assert_same(contents(tmp_path / "found")[STEPS], contents(tmp_path / "expected")[STEPS])
    assert len(records(tmp_path / "found", "rollback")) == 1
    spikes = records(tmp_path / "found", "spike")
    assert [spike["iteration"] for spike in spikes] == [SPIKE, SPIKE + 1, SPIKE + 2]
    assert "nothing to undo" in spikes[1]["action"]


@pytest.mark.long
def test_without_a_checkpoint_old_enough_the_step_is_skipped(tmp_path: Path) -> None:
    write_spiked_data(tmp_path)
    expected = train(tmp_path, "one", "expected", TRAIN_RANGE_TO_SKIP=f"{SPIKE} {SPIKE}")
    found = train(tmp_path, "one", "found", SPIKE_POLICY="rollback", ROLLBACK_STEPS="28")
    assert statuses(expected) == statuses(found) == {0}
    assert_same(contents(tmp_path / "found")[STEPS], contents(tmp_path / "expected")[STEPS])
    (spike,) = records(tmp_path / "found", "spike")
    assert "no rollback: no checkpoint" in spike["action"] and "SAVE_INTERVAL" in spike["action"]


def test_after_the_last_rollback_the_run_ends_with_5(tmp_path: Path) -> None:
    write_spiked_data(tmp_path)
    found = train(tmp_path, "dp2", "found", SPIKE_POLICY="rollback", MAX_ROLLBACKS="0")
    assert statuses(found) == {5}
    assert max(contents(tmp_path / "found")) == 25
    (stop,) = records(tmp_path / "found", "stop")
    assert "MAX_ROLLBACKS=0" in stop["reason"]


def printed(settings: dict[str, str]) -> str:
    """What a run writes to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as error:
        train_recorded(settings)
    return error.getvalue()


@pytest.mark.parametrize("save", ["1", "5"])
def test_the_end_names_the_checkpoint_before_the_bad_steps(save: str, tmp_path: Path) -> None:
    """A rate of 1e6: the first step's weights give no finite gradient, however often saved."""
    write_data(tmp_path)
    settings = {
        "DATA_FILE_LIST": str(tmp_path / "list.txt"), "RUN_DIR": str(tmp_path / "found"),
        "LR": "1e6", "LR_WARMUP_FRAC": "0", "SAVE_INTERVAL": save, "MAX_BAD_STEPS": "7",
    }  # fmt: skip
    (text,) = run(printed, 1, settings)
    taken = [r for r in records(tmp_path / "found", "step") if not r["skipped_iterations"]]
    changed = taken[-1]["iteration"]
    assert text.startswith("error: 7 steps in a row changed no weight (MAX_BAD_STEPS); ")
    if save == "5":
        assert f"no checkpoint is as old as step {changed};" in text
    else:
        assert (
            f"the last good checkpoint is {tmp_path}/found/checkpoints/step-{changed:08d}" in text
        )
    assert f"move them out of {tmp_path}/found/checkpoints" in text


@pytest.mark.parametrize(("layout", "policy"), [("one", "off"), ("pp2", "skip"), ("zero3", "warn")])
def test_weights_that_are_not_finite_are_never_saved(
    layout: str, policy: str, tmp_path: Path
) -> None:
    """The update itself overflows: no gradient has told before."""
    write_data(tmp_path)
    found = train(
        tmp_path, layout, "found", SPIKE_POLICY=policy, LR="1e38", LR_WARMUP_FRAC="0",
        SAVE_INTERVAL="1", LOG_INTERVAL="1000",
    )  # fmt: skip
    assert statuses(found) == {5}
    for tensors in contents(tmp_path / "found").values():
        assert all(value.isfinite().all() for value in tensors.values())
    (stop,) = records(tmp_path / "found", "stop")
    assert "not finite" in stop["reason"]


def test_a_loss_that_is_not_finite_ends_the_run_at_the_next_log_line(tmp_path: Path) -> None:
    """Where the weights are not finite either: no later step can be one."""
    write_data(tmp_path)
    found = train(
        tmp_path, "one", "found", LR="1e38", LR_WARMUP_FRAC="0", SAVE_INTERVAL="0",
        LOG_INTERVAL="3", MAX_BAD_STEPS="0",
    )  # fmt: skip
    assert statuses(found) == {5}
    (stop,) = records(tmp_path / "found", "stop")
    assert stop["iteration"] == 3 and "not finite" in stop["reason"]


def test_a_run_that_no_longer_learns_ends_with_5(tmp_path: Path) -> None:
    """The review's case: a rate of 1e6 leaves weights that are finite and gradients that are not.

    A range to skip on the way is not counted.
    """
    write_data(tmp_path)
    found = train(
        tmp_path, "one", "found", LR="1e6", LR_WARMUP_FRAC="0", SAVE_INTERVAL="0", OPT="sgd",
        MAX_BAD_STEPS="7", TRAIN_RANGE_TO_SKIP="8 9", LOG_INTERVAL="100", SPIKE_POLICY="off",
    )  # fmt: skip
    assert statuses(found) == {5}
    (stop,) = records(tmp_path / "found", "stop")
    assert stop["reason"] == "7 steps in a row changed no weight (MAX_BAD_STEPS)"
    assert stop["iteration"] > 9
