"""What a run's folder tells of it: configuration, provenance, records, corpora."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.analysis.summary import flatten, training_steps
from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import RunConfig
from megatron.training import metrics_file

PROVENANCE = "provenance"
"""Key of run.json's section on where the run was made."""


@dataclass(frozen=True)
class RecordedRun:
    """A run as it is on disk.

    Attributes:
        name: how it is called.
        config: run.json's nested configuration; empty where there is none.
        origin: its provenance.
        records: of metrics.jsonl.
        corpora: (corpus, files, tokens, share) of the data that it read last.
    """

    name: str
    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    corpora: Sequence[tuple[str, int, int, float]] = ()

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """Records of the steps that did work, in order."""
        return training_steps(self.records)

    @property
    def settings(self) -> dict[str, Any]:
        """Last part of each of the configuration's keys -> its value."""
        flat = flatten(self.config)
        return {name.rpartition(".")[2]: value for name, value in flat.items()}

    @property
    def resolved(self) -> RunConfig | None:
        """The configuration, None where it is not one of this version."""
        try:
            return RunConfig.from_dict(self.config)
        except (ConfigError, TypeError, ValueError):
            return None


def recorded(
    run: Mapping[str, Any], records: Iterable[Mapping[str, Any]], name: str
) -> RecordedRun:
    """A run from its run.json and its records."""
    config = run.get("config") or {key: value for key, value in run.items() if key != PROVENANCE}
    return RecordedRun(name, config, run.get(PROVENANCE, {}), list(records))


def read_folder(folder: Path) -> RecordedRun:
    """The run in a folder.

    Raises:
        OSError: run.json or metrics.jsonl cannot be read.
        DataError: one of them is damaged.
    """
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(run, dict)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{path}: not a run's configuration: {error}") from error
    address = folder / "wandb" / "run_url"
    if address.exists():
        run.setdefault(PROVENANCE, {})["wandb"] = address.read_text(encoding="utf-8").strip()
    plain = recorded(run, metrics_file.read(folder / "metrics.jsonl"), folder.resolve().name)
    return replace(plain, corpora=_corpora(folder))


def read_all(folders: Sequence[Path]) -> list[RecordedRun]:
    """The runs in these folders; where two have the same name, what their paths differ in."""
    runs = [read_folder(folder) for folder in folders]
    if len({run.name for run in runs}) == len(runs):
        return runs
    paths = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath(paths))
    return [
        replace(run, name=str(path.relative_to(common)))
        for run, path in zip(runs, paths, strict=True)
    ]


def folders(paths: Iterable[Path]) -> list[Path]:
    """Run folders or files of records, as given; of a folder of runs, all runs in it, by name.

    Raises:
        ConfigError: a path is neither.
    """
    found: list[Path] = []
    for path in paths:
        path = path.parent if path.name == "metrics.jsonl" else path
        inside = sorted(each.parent for each in path.glob("*/metrics.jsonl"))
        if path.is_file() or (path / "metrics.jsonl").is_file():
            found.append(path)
            continue
        if not inside:
            raise ConfigError(
                f"{path} is no run: give a run's folder or its metrics.jsonl, or a folder of runs"
            )
        found += inside
    return list(dict.fromkeys(found))


def _corpora(folder: Path) -> list[tuple[str, int, int, float]]:
    """Of the newest checkpoint's record of its data; none where that is not known."""
    files = sorted(folder.glob("checkpoints/step-*/data.json"))
    try:
        record = json.loads(files[-1].read_text(encoding="utf-8"))[-1]["record"]
        places = [record["columns"].index(name) for name in ("corpus", "tokens", "weight")]
        rows = [[file[place] for place in places] for file in record["stages"][-1]["files"]]
        whole = sum(weight for _, _, weight in rows)
        named = {corpus: [row for row in rows if row[0] == corpus] for corpus, _, _ in rows}
        return [
            (corpus, len(of), sum(row[1] for row in of), sum(row[2] for row in of) / whole)
            for corpus, of in named.items()
        ]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
        return []  # no checkpoint, or one of another version
