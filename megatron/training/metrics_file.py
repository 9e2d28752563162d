"""metrics.jsonl: one JSON object per line, readable by the strictest parser.

JSON has no NaN. A number that is not finite is written as null and named in `non_finite`: {"loss":
NaN} becomes {"loss": null, "non_finite": {"loss": "nan"}}, also in nested objects. `decode` undoes
it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError, DataError

MetricsRecord = dict[str, Any]
"""One line of the file: an event (a name in EVENTS), its step and its numbers."""

MARK = "non_finite"


def encode(record: Mapping[str, Any]) -> str:
    """One line of the file, without its newline.

    Raises:
        ValueError: a number inside a list is not finite (only values of objects can be marked).
    """
    return json.dumps(_mark(record), allow_nan=False)


def decode(line: str) -> MetricsRecord:
    """The record that `encode` wrote, marked numbers restored.

    Raises:
        ValueError: not a JSON object.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {line.strip()[:80]}")
    return _unmark(record)


def locate(run: Path) -> Path:
    """The metrics.jsonl of a run given by its folder or by the file itself.

    Raises:
        ConfigError: there is none.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give a run's folder or its metrics.jsonl")
    return path


def read(path: Path) -> list[MetricsRecord]:
    """All records of a file; a last line without newline, still being written, is left out.

    Raises:
        DataError: another line is not a record; the message names file and line.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = decode(line)
            if not {"event", "iteration"} <= record.keys():
                raise ValueError("it has no event or no iteration")
            records.append(record)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a metrics record: {error}") from error
    return records


def truncate_after(path: Path, iteration: int) -> int:
    """Drop what a resumed run will repeat: records after `iteration`, and truncated lines.

    The file is replaced in one step, so a crash here loses nothing; a missing file stays missing.

    Returns:
        Number of lines dropped.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line for line in lines if _is_until(line, iteration)]
    dropped = sum(1 for line in lines if line) - len(kept)
    if dropped or lines[-1]:  # the next record would be appended to a line without its newline
        write_atomically(path, "".join(f"{line}\n" for line in kept))
    return dropped


def _is_until(line: str, iteration: int) -> bool:
    try:
        return bool(decode(line)["iteration"] <= iteration)
    except (ValueError, KeyError, TypeError):  # truncated, or without a usable iteration
        return False


def _mark(record: Mapping[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    marks: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            clean[name] = _mark(value)
        elif isinstance(value, float) and not math.isfinite(value):
            clean[name] = None
            marks[name] = str(value)
        else:
            clean[name] = value
    return clean | {MARK: marks} if marks else clean


def _unmark(record: dict[str, Any]) -> dict[str, Any]:
    values = {
        name: _unmark(value) if isinstance(value, dict) else value for name, value in record.items()
    }
    marks = values.pop(MARK, {})
    return values | {name: float(value) for name, value in marks.items()}
