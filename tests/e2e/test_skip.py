"""Ranges to skip: other steps see the tokens they would have seen; what is skipped is not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.recorded import Recording, train_recorded, write_data
from tests.spawn import run

GLOBAL_BATCH = 8
LAYOUTS = {"one": {}, "tp2": {"TP": "2"}, "pp2": {"PP": "2"}, "dp2": {"WORLD_SIZE": "2"}}
SKIPPED = {4, 5, 6, 9}
RANGES = "4 6 9 9"


def record(tmp_path: Path, name: str, layout: str, **variables: str) -> list[Recording]:
    world = 1 if layout == "one" else 2
    settings = {
        **LAYOUTS[layout],
        "DATA_FILE_LIST": str(tmp_path / "list.txt"),
        "RUN_DIR": str(tmp_path / name),
        **variables,
    }
    results = run(train_recorded, world, settings)
    assert [result.status for result in results] == [0] * world
    return results


def samples_of(steps: set[int]) -> set[int]:
    return {k for step in steps for k in range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.long] * (name != "one")) for name in LAYOUTS],
)
def test_other_steps_see_the_same_tokens(layout: str, tmp_path: Path) -> None:
    write_data(tmp_path)
    whole = record(tmp_path, "whole", layout)
    # Stops in the middle of a range and goes on from there.
    first = record(tmp_path, "cut", layout, TRAIN_RANGE_TO_SKIP=RANGES, TRAIN_ITERS="5")
    second = record(tmp_path, "cut", layout, TRAIN_RANGE_TO_SKIP=RANGES)
    taken = [step for step in range(1, 13) if step not in SKIPPED]
    for before, a, b in zip(whole, first, second, strict=True):
        assert len(before.fed) == 12
        assert a.fed + b.fed == [before.fed[step - 1] for step in taken]
    # Sampling a text at the end reads the first validation sample, number 0: of no skipped step.
    read = set().union(*(result.read for result in first + second))
    assert read == samples_of(set(taken))


def test_counters_and_rate_advance(tmp_path: Path) -> None:
    from megatron.training.metrics_file import read

    write_data(tmp_path)
    record(tmp_path, "whole", "one")
    record(tmp_path, "cut", "one", TRAIN_RANGE_TO_SKIP=RANGES)
    whole, cut = (
        {
            row["iteration"]: row
            for row in read(tmp_path / name / "metrics.jsonl")
            if "learning_rate" in row
        }
        for name in ("whole", "cut")
    )
    for step in range(1, 13):
        assert cut[step]["event"] == ("skip" if step in SKIPPED else "step")
        for name in ("consumed_samples", "consumed_tokens", "learning_rate"):
            assert cut[step][name] == whole[step][name]
    assert all("loss" not in cut[step] and "tokens_per_s" not in cut[step] for step in SKIPPED)


def test_dumped_tokens_of_a_skipped_step_are_those_it_would_have_seen(tmp_path: Path) -> None:
    """The same tokens, dumped by a run that takes the step and by one that skips it."""
    write_data(tmp_path)
    dumps = {}
    for name, variables in {
        "taken": {"DUMP_TOKENS": "1"},
        "skipped": {"DUMP_SKIPPED_ITERS": "1", "TRAIN_RANGE_TO_SKIP": RANGES},
    }.items():
        dumps[name] = dumped(record_output(tmp_path, name, variables))
    assert set(dumps["taken"]) == set(range(1, 11))
    assert set(dumps["skipped"]) == SKIPPED
    assert all(dumps["skipped"][step] == dumps["taken"][step] for step in SKIPPED)


def record_output(tmp_path: Path, name: str, variables: dict[str, str]) -> str:
    settings = {"DATA_FILE_LIST": str(tmp_path / "list.txt"), "RUN_DIR": str(tmp_path / name)}
    return run(printed, 1, {**settings, **variables})[0]


def printed(settings: dict[str, str]) -> str:
    """What a run prints."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        train_recorded(settings)
    return text.getvalue()


def dumped(text: str) -> dict[int, str]:
    """Step -> its dumped tokens, prefixes cut off."""
    found: dict[int, str] = {}
    step = None
    for line in text.splitlines():
        if "][dump] - iteration=" in line:
            step = int(line.split("iteration=")[1].split()[0])
            found[step] = found.get(step, "")
        elif line.startswith("[") and "][" in line:
            step = None
        if step is not None and "][dump]" not in line:
            found[step] += line + "\n"
    return found
