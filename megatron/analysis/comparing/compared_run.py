"""A run as a comparison reads it: its records, its settings, where it was made.

A folder without a finished step is a run as well: a row that ran out of memory stays in the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.analysis.summary import flatten
from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import RUN_FILE, by_key, by_variable
from megatron.training.metrics_file import MetricsRecord, locate, read

ROW_FILE = "sweep_row.json"
"""What tools/sweep.py writes into a row's folder: variables, status, seconds."""

METRICS_FILE = "metrics.jsonl"
SIGNS = (METRICS_FILE, RUN_FILE, ROW_FILE, "output.log")
"""A folder that holds one of them is a run's."""

NEVER_ALIKE = {"checkpoint.run_name", "checkpoint.run_dir", "checkpoint.save", "checkpoint.resume"}
"""Settings in which any two runs differ."""

ORIGINS = ("commit", "versions.", "machine", "platform", "devices_per_host", "scheduler", "trainer")
"""What of a run's provenance is compared: no times, jobs, and no variables (settings hold them)."""


@dataclass(frozen=True)
class ComparedRun:
    """One run.

    Attributes:
        name: of its folder.
        folder: what holds its files.
        records: of metrics.jsonl; none before the first step.
        settings: of run.json, by `<section>.<field>`; else what its sweep has set.
        whole: these are all settings.
        origin: provenance of run.json, flattened.
        row: of the sweep that it belongs to; empty without one.
    """

    name: str
    folder: Path
    records: Sequence[MetricsRecord]
    settings: Mapping[str, Any]
    whole: bool
    origin: Mapping[str, Any]
    row: Mapping[str, Any]

    @property
    def wandb(self) -> str | None:
        """Address of the run at W&B; None without one."""
        path = self.folder / "wandb" / "run_url"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    @property
    def report(self) -> str | None:
        """Its report, HTML before Markdown; None without one."""
        found = (self.folder / name for name in ("report.html", "report.md"))
        return next((str(path) for path in found if path.is_file()), None)


def open_run(path: Path) -> ComparedRun:
    """A run given by its folder or its metrics.jsonl.

    Raises:
        ConfigError: there is no run.
        DataError: one of its files is damaged.
    """
    folder = path if is_run(path) else locate(path).parent
    metrics = path if path.is_file() else folder / METRICS_FILE
    run, row = _object(folder / RUN_FILE), _object(folder / ROW_FILE)
    nested = run.get("config")
    settings = nested if isinstance(nested, Mapping) else run
    flat = {
        key: value
        for key, value in flatten(settings).items()
        if not key.startswith(("provenance.", "sources"))
    }
    known = by_variable()
    given = {**row.get("common", {}), **row.get("variables", {})}
    typed = {
        known[name].key: _typed(known[name].kind, text)
        for name, text in given.items()
        if name in known
    }
    return ComparedRun(
        name=folder.resolve().name,
        folder=folder,
        records=read(metrics) if metrics.is_file() else [],
        settings=flat or typed,
        whole=bool(flat),
        origin=flatten(run.get("provenance", {})),
        row=row,
    )


def runs_in(paths: Iterable[Path]) -> list[Path]:
    """The runs named by `paths`; a folder of runs, or of sweeps, stands for all of them.

    Raises:
        ConfigError: a path names no run.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file() or is_run(path):
            found.append(path)
            continue
        inside = sorted(own for pattern in ("*", "*/*") for own in path.glob(pattern))
        below = [own for own in inside if is_run(own) and not is_run(own.parent)]
        if not below:
            raise ConfigError(f"{path} is no run, and no folder of runs: none has {METRICS_FILE}")
        found += below
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return folder.is_dir() and any((folder / name).is_file() for name in SIGNS)


def names_of(runs: Sequence[ComparedRun]) -> list[str]:
    """What the runs are called in a table: folder names, or paths where two are alike."""
    names = [run.name for run in runs]
    return names if len({*names}) == len(names) else [str(run.folder) for run in runs]


def differing(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, and their value in each; None where unset.

    A setting is called by its variable, else its flag; provenance comes after the settings.
    """
    settings = _unlike([run.settings for run in runs], [run.whole for run in runs])
    origins = _unlike([run.origin for run in runs], [bool(run.origin) for run in runs])
    found = {_called(key): values for key, values in settings.items() if key not in NEVER_ALIKE}
    return found | {key: v for key, v in origins.items() if key.startswith(ORIGINS)}


def _unlike(settings: Sequence[Mapping[str, Any]], whole: Sequence[bool]) -> dict[str, list[Any]]:
    """Keys with unlike values; one that is absent differs where the settings are whole."""
    found = {}
    for key in dict.fromkeys(key for one in settings for key in one):
        known = [
            str(one.get(key)) for one, all_of in zip(settings, whole, strict=True)
            if all_of or key in one
        ]  # fmt: skip
        if len({*known}) > 1:
            found[key] = [one.get(key) for one in settings]
    return found


def _called(key: str) -> str:
    option = by_key().get(key)
    return (*option.env, *option.flags, key)[0] if option else key


def _typed(kind: str, text: str) -> Any:
    """A variable's text as the configuration would hold it; the text where it is none."""
    try:
        if kind == "bool":
            return text.lower() not in ("", "0", "false", "no", "off")
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError:
        return text


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none.

    Raises:
        DataError: it is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: not a JSON object: {error}") from error
