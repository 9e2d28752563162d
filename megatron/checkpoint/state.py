"""RunState: a run's counters, which a checkpoint holds besides weights and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_STAGE_COUNTERS = ("iteration", "samples", "tokens")


@dataclass(frozen=True)
class DataStage:
    """A part of a run that was trained on the same data.

    Attributes:
        iteration, samples, tokens: consumed before its first step.
        record: everything that determines its samples (megatron/data/data_record.py).
        drawn: draws of each file before it, which it does not repeat.
    """

    iteration: int
    samples: int
    tokens: int
    record: dict[str, Any]
    drawn: dict[str, int]


@dataclass(frozen=True)
class RunState:
    """Where a run is. Frozen: a step makes the next one.

    Attributes:
        iteration: steps done, skipped ones included; the number of the last step.
        consumed_samples: samples of these steps, read or not; the data cursor.
        consumed_tokens: the same in tokens.
        skipped_iterations: steps that changed no weight (a range to skip, an overflow, a refused
            update).
        nan_iterations: steps whose loss was not finite.
        skip_ranges: ranges (first, last), inclusive, of steps not to train on.
        data: what it was trained on, the current stage last.
        rollbacks: returns to an earlier checkpoint after a spike.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    nan_iterations: int = 0
    skip_ranges: tuple[tuple[int, int], ...] = ()
    data: tuple[DataStage, ...] = ()
    rollbacks: int = 0

    def after(self, samples: int, tokens: int, *, skipped: bool = False) -> RunState:
        """The state after one more step of `samples` and `tokens`, skipped or not."""
        return dataclasses.replace(
            self,
            iteration=self.iteration + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_iterations=self.skipped_iterations + int(skipped),
        )

    def with_skipped(self, count: int) -> RunState:
        """The state with more steps known to have changed no weight."""
        return dataclasses.replace(self, skipped_iterations=self.skipped_iterations + count)

    def with_nan(self, count: int) -> RunState:
        """The state with more non-finite losses, known only when losses are fetched."""
        return dataclasses.replace(self, nan_iterations=self.nan_iterations + count)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: a field is missing, unknown or of another kind than `to_dict` writes.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        values = {"rollbacks": 0, **values}  # checkpoints of earlier versions have none
        if set(values) != set(names):
            raise ValueError(f"a run's state has the fields {names}, found {sorted(values)}")
        counters = {name: values[name] for name in names if name not in ("skip_ranges", "data")}
        _require_counters("a run's state", counters)
        try:
            ranges = tuple((int(first), int(last)) for first, last in values["skip_ranges"])
        except (TypeError, ValueError):
            raise ValueError(
                f"a run's state: skip_ranges={values['skip_ranges']!r} are no pairs of steps"
            ) from None
        return cls(**counters, skip_ranges=ranges, data=_data_stages(values["data"]))


def _data_stages(rows: Any) -> tuple[DataStage, ...]:
    names = {field.name for field in dataclasses.fields(DataStage)}
    if not isinstance(rows, list | tuple):
        raise ValueError("the record of the data is no list of stages")
    for row in rows:
        if not isinstance(row, dict) or set(row) != names:
            raise ValueError(f"a stage of the data has the fields {sorted(names)}, found {row!r}")
        if not isinstance(row["record"], dict) or not isinstance(row["drawn"], dict):
            raise ValueError("a stage of the data: record and drawn are no objects")
        _require_counters("a stage of the data", {key: row[key] for key in _STAGE_COUNTERS})
    return tuple(DataStage(**row) for row in rows)


def _require_counters(of: str, counters: Mapping[str, Any]) -> None:
    for name, value in counters.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{of}: {name}={value!r} is not a whole number >= 0")
