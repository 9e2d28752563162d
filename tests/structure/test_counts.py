"""A reader's ways through the sources stay short: a step, a save, a setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.structure.count import JOURNEYS, ROOT, count, measure, over_limit, tables


@pytest.fixture(scope="module")
def journeys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What the traced run entered."""
    return measure(tmp_path_factory.mktemp("counted"))


@pytest.mark.parametrize("name", JOURNEYS)
def test_the_way_is_short(name: str, journeys: dict[str, dict[str, int]]) -> None:
    print(tables({name: journeys[name]}))
    assert over_limit(name, journeys[name]) == []


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (
            "step",  # data in the thread that reads ahead, model, loss, and types of annotations
            ["data/dataset.py", "data/loader.py", "data/samples.py", "engine/sharded.py",
             "model/attention.py", "parallel/head_loss.py", "checkpoint/state.py"],
        ),
        ("save", ["checkpoint/store.py", "checkpoint/tensors.py", "engine/shards.py"]),
        ("setting", ["config/schema.py", "config/option.py", "engine/sharded.py"]),
    ],
)  # fmt: skip
def test_what_is_surely_on_the_way_is_counted(
    name: str, files: list[str], journeys: dict[str, dict[str, int]]
) -> None:
    assert {f"megatron/{file}" for file in files} <= journeys[name].keys()


def test_whole_files_are_counted(journeys: dict[str, dict[str, int]]) -> None:
    for files in journeys.values():
        for name, lines in files.items():
            assert lines == len((ROOT / Path(name)).read_text().splitlines())


def test_what_is_not_on_the_way_is_not_counted(journeys: dict[str, dict[str, int]]) -> None:
    others = ("/launch/", "/prepare/", "/checkpoint/saver", "training/respond")
    here = [name for name in journeys["step"] if any(other in name for other in others)]
    assert here == ["megatron/launch/heartbeat.py"]  # a step tells the launcher where it is
    assert "megatron/parallel/layers.py" not in journeys["save"]


def test_above_a_limit_is_said_in_words() -> None:
    files = {f"megatron/model/{number}.py": 2500 for number in range(2)}
    assert count(files) == (2, 5000, 1)
    assert over_limit("step", files) == ["one training step: 5000 lines, at most 4350"]
    assert over_limit("save", files) == []
