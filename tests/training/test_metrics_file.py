"""metrics.jsonl: strict JSON, and what a crash leaves of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError, DataError
from megatron.training import metrics_file

NUMBERS = st.one_of(st.none(), st.integers(), st.floats(), st.text())
RECORDS = st.dictionaries(
    st.text().filter(lambda name: name != metrics_file.MARK),
    st.one_of(
        NUMBERS, st.dictionaries(st.text().filter(lambda n: n != metrics_file.MARK), NUMBERS)
    ),
)


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def same(a: Any, b: Any) -> bool:
    """Equality for which NaN equals NaN."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a + b))


@given(RECORDS)
def test_any_record_is_one_line_of_strict_json_and_comes_back(record: dict[str, Any]) -> None:
    text = metrics_file.encode(record)
    json.loads(text, parse_constant=refuse)
    assert "\n" not in text
    assert same(metrics_file.decode(text), record)


def test_what_is_not_finite_is_null_and_named() -> None:
    record = {"loss": math.nan, "grad_norm": math.inf, "corpus_loss": {"a.b": -math.inf, "c": 1.0}}
    assert json.loads(metrics_file.encode(record)) == {
        "loss": None,
        "grad_norm": None,
        "corpus_loss": {"a.b": None, "c": 1.0, "non_finite": {"a.b": "-inf"}},
        "non_finite": {"loss": "nan", "grad_norm": "inf"},
    }


def test_a_nan_in_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        metrics_file.encode({"losses": [math.nan]})


def write(path: Path, iterations: list[int], tail: str = "") -> Path:
    lines = [metrics_file.encode({"event": "step", "iteration": i}) for i in iterations]
    path.write_text("".join(f"{line}\n" for line in lines) + tail)
    return path


def iterations(path: Path) -> list[int]:
    return [record["iteration"] for record in metrics_file.read(path)]


def test_read_leaves_out_a_line_that_is_being_written(tmp_path: Path) -> None:
    assert iterations(write(tmp_path / "m", [1, 2], '{"event": "step", "iter')) == [1, 2]


@pytest.mark.parametrize("damage", ["nonsense\n", "[1]\n", '{"event": "step"}\n', "\n"])
def test_read_names_a_damaged_line(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "m", [1, 2], damage)
    with pytest.raises(DataError, match=f"{path}:3: not a metrics record"):
        metrics_file.read(path)


def test_truncate_keeps_what_the_checkpoint_knows(tmp_path: Path) -> None:
    path = write(tmp_path / "m", [1, 2, 2, 3, 4], '{"event": "st')
    assert metrics_file.truncate_after(path, 2) == 3
    assert iterations(path) == [1, 2, 2]
    assert path.read_text().endswith("\n")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_truncate_drops_lines_that_a_crash_damaged(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"event": "step", "iteration": 1}\n\x00\x00\xff\n{"a": 1}\n[]\n')
    assert metrics_file.truncate_after(path, 9) == 3
    assert iterations(path) == [1]


def test_truncate_leaves_a_good_file_untouched(tmp_path: Path) -> None:
    path = write(tmp_path / "m", [1, 2])
    before = path.stat()
    assert metrics_file.truncate_after(path, 2) == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_truncate_to_nothing_and_of_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "m", [1, 2])
    assert metrics_file.truncate_after(path, 0) == 2
    assert path.read_text() == ""
    assert metrics_file.truncate_after(tmp_path / "absent", 5) == 0
    assert not (tmp_path / "absent").exists()


def test_truncate_completes_a_last_line_that_only_lacks_its_newline(tmp_path: Path) -> None:
    """Else the next record would be glued to it."""
    path = write(tmp_path / "m", [1], '{"event": "step", "iteration": 2}')
    metrics_file.truncate_after(path, 2)
    assert iterations(path) == [1, 2]


def test_a_crash_while_truncating_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m", [1, 2, 3])

    def crash(*arguments: object) -> NoReturn:
        raise OSError("power")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="power"):
        metrics_file.truncate_after(path, 1)
    assert iterations(path) == [1, 2, 3]


def test_a_run_is_its_folder_or_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [1])
    assert metrics_file.locate(tmp_path) == metrics_file.locate(path) == path
    with pytest.raises(ConfigError, match="does not exist"):
        metrics_file.locate(tmp_path / "absent")
