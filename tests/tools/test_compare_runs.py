"""tools/compare_runs.py: figures, formats and statuses."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron.training import metrics_file
from tests.training import records_factory as make
from tools import compare_runs


def write(folder: Path, rows: list[dict[str, Any]], run: dict[str, Any] | None = None) -> str:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{metrics_file.encode(row)}\n" for row in rows))
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    return str(folder)


def steps(losses: list[float], **changes: Any) -> list[dict[str, Any]]:
    return [make.step(i, loss, **changes) for i, loss in enumerate(losses, start=1)]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """B differs in the loss of step 3 and the norm of step 2, is twice as fast and uses TP=2."""
    a = steps([3.0, 2.0, 1.0, 0.5])
    b = steps([3.0, 2.0, 1.25, 0.5], elapsed_s=0.25, tflops_lm=6.0)
    b[1]["grad_norm"] = 1.0 + 1e-7
    config = {"parallel": {"tensor_parallel": 1, "zero_stage": 1}, "machine": "generic"}
    other = {"parallel": {"tensor_parallel": 2, "zero_stage": 1}, "machine": "generic"}
    other["sources"] = ["parallel.tensor_parallel: TP"]  # where values came from tells nothing more
    return write(tmp_path / "a", a, config), write(tmp_path / "b", b, other)


def test_what_differs_is_told(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_runs.main([*pair, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"]["matched_iterations"] == 4
    assert found["steps"]["max_loss_difference"] == 0.25
    assert found["steps"]["first_iteration_with_different_loss"] == 3
    assert found["steps"]["max_grad_norm_difference"] == pytest.approx(1e-7, rel=1e-3)
    assert found["steps"]["first_iteration_with_different_grad_norm"] == 2
    assert found["configuration"] == {"TP": [1, 2]}
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["tokens/s"]["a"] == 64.0
    assert rows["steps/s per device"]["b"] == pytest.approx(2.0)
    for name in ("tokens/s", "steps/s", "TFLOPS per device"):
        assert rows[name]["B / A"] == pytest.approx(2.0)


def test_two_runs_stand_beside_one_another_and_a_folder_is_a_table(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_runs.main([*pair, "--format", "csv"]) == 0
    table = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert table[0] == ["what", "a", "b", "B / A", "note"]
    assert [row[0] for row in table[2:8]] == [
        "parameters", "steps", "tokens seen", "last loss", "best validation loss", "tokens/s"
    ]  # fmt: skip
    assert ["tokens/s", "64.0", "128.0", "2.0", ""] in table
    assert ["TP", "1", "2", "", "setting"] in table
    assert compare_runs.main([str(tmp_path), "--sort", "tokens/s", "--descending"]) == 0
    heading, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert heading.split()[1:4] == ["run", "|", "status"]
    assert first.startswith("| b ") and second.startswith("| a ")
    for bad in (["--sort", "x"], ["--assert-equal", "0"]):
        assert compare_runs.main([str(tmp_path), *bad]) == 2
    (tmp_path / "empty").mkdir()
    assert compare_runs.main([str(tmp_path / "empty")]) == 2


@pytest.mark.parametrize(("tolerance", "status"), [("0.26", 0), ("0.25", 0), ("0.249", 1)])
def test_equality_is_within_the_tolerance(
    pair: tuple[str, str], tolerance: str, status: int
) -> None:
    assert compare_runs.main([*pair, "--assert-equal", tolerance]) == status


def test_a_gradient_norm_alone_is_enough_to_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", steps([1.0]))
    b = write(tmp_path / "b", steps([1.0], grad_norm=1.5))
    assert compare_runs.main([a, b, "--assert-equal", "1e-5"]) == 1
    assert "grad_norm differs by 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ([math.nan], [math.nan], 0),
        ([math.nan], [1.0], 1),
        ([math.inf], [math.inf], 0),
        ([math.inf], [-math.inf], 1),
        ([1.0, 2.0], [1.0], 1),
        ([1.0], [1.0, 2.0], 1),
        ([], [1.0], 1),
        ([], [], 1),
    ],
)
def test_equality_of_what_is_not_a_number_or_not_there(
    tmp_path: Path, first: list[float], second: list[float], status: int
) -> None:
    runs = [write(tmp_path / "a", steps(first)), write(tmp_path / "b", steps(second))]
    assert compare_runs.main([*runs, "--assert-equal", "1e9"]) == status


def test_an_absent_norm_equals_only_an_absent_norm(tmp_path: Path) -> None:
    a = write(tmp_path / "a", steps([1.0], grad_norm=None))
    b = write(tmp_path / "b", steps([1.0]))
    assert compare_runs.main([a, a, "--assert-equal", "0"]) == 0
    assert compare_runs.main([a, b, "--assert-equal", "1"]) == 1


def test_bad_input_has_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good", steps([1.0]))
    damaged = write(tmp_path / "damaged", steps([1.0]))
    (tmp_path / "damaged" / "metrics.jsonl").write_text("x\n")
    odd = write(tmp_path / "odd", steps([1.0]))
    (tmp_path / "odd" / "run.json").write_text("3")
    assert compare_runs.main([good, str(tmp_path / "absent")]) == 2
    assert compare_runs.main([good, good, "--assert-equal", "-1"]) == 2
    assert compare_runs.main([good, good, "--assert-equal", "nan"]) == 2
    assert compare_runs.main([good, damaged]) == 3
    assert compare_runs.main([good, odd]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("compare_runs: ") == 5
