"""The rows of a sweep: from a grid or a file, each with its folder and its command."""

from __future__ import annotations

import difflib
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.analysis.comparing.compared_run import ROW_FILE
from megatron.config.errors import ConfigError
from megatron.config.schema import by_variable
from megatron.launch.provenance import RECORDED

NAMED_HERE = {"RUN_NAME", "RUN_DIR", "SAVE", "LOAD", "CKPT_DIR", "RESUME"}


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        variables: what is set in it.
        folder: of the run.
        flags: of train_alcf.sh, the same in all rows.
    """

    variables: Mapping[str, str]
    folder: Path
    flags: Sequence[str]

    @property
    def text(self) -> str:
        """Its settings."""
        return " ".join(f"{name}={shlex.quote(value)}" for name, value in self.variables.items())

    @property
    def environment(self) -> dict[str, str]:
        """What is set for it."""
        name = f"{self.folder.parent.name}-{self.folder.name}"
        return {**self.variables, "RUN_NAME": name, "RUN_DIR": str(self.folder)}

    @property
    def words(self) -> list[str]:
        """Its command."""
        return ["bash", "train_alcf.sh", *self.flags]

    @property
    def ended(self) -> dict[str, Any]:
        """How it has ended; empty where it has not."""
        path = self.folder / ROW_FILE
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found


def grid(settings: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of `NAME=a,b`; the last name changes first.

    Raises:
        ConfigError: not of this form, or there is none.
    """
    values: dict[str, list[str]] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        values[name] = [value for value in text.split(",") if value]
        if not equals or not values[name]:
            raise ConfigError(f"{setting}: write NAME=value,value, such as NLAYERS=4,8")
    if not values:
        raise ConfigError("nothing to sweep: give NAME=value,value, such as NLAYERS=4,8, or --rows")
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def from_file(path: Path) -> list[dict[str, str]]:
    """Rows of a file: names, then a line of values each, divided by blanks; # begins a comment.

    Raises:
        ConfigError: it cannot be read, or a line has another number of values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--rows {path}: {error.strerror}") from None
    lines = [(n, line.partition("#")[0].split()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(number, words) for number, words in lines if words]
    if len(lines) < 2:
        raise ConfigError(f"--rows {path}: a line of names, then a line of values for each row")
    (_, names), *rows = lines
    for number, values in rows:
        if len(values) != len(names):
            raise ConfigError(f"{path}:{number}: {len(values)} values for {len(names)} names")
    return [dict(zip(names, values, strict=True)) for _, values in rows]


def named(row: Mapping[str, str]) -> str:
    """Folder of a row."""
    return re.sub(r"[^\w.+-]", "_", "-".join(f"{name}{value}" for name, value in row.items()))


def require_known(names: Sequence[str]) -> None:
    """Refuses names that no run reads, and those that a sweep sets itself.

    Raises:
        ConfigError: names one of them, and what is like it.
    """
    known = {*by_variable(), *RECORDED}
    for name in names:
        if name in NAMED_HERE:
            raise ConfigError(f"{name} is set by the sweep: use --name and --runs")
        if name not in known:
            like = difflib.get_close_matches(name, known, 3)
            raise ConfigError(f"{name} is no setting. Did you mean {' or '.join(like) or '...'}?")


def require_same(rows: Sequence[Row], common: Mapping[str, str]) -> None:
    """Refuses to add to rows that were made with other settings.

    Raises:
        ConfigError: shows what differs.
    """
    for row in rows:
        before = row.ended.get("common", common)
        if before != common:
            names = [n for n in {**before, **common} if before.get(n) != common.get(n)]
            changed = ", ".join(f"{n} {before.get(n)} -> {common.get(n)}" for n in names)
            raise ConfigError(
                f"{row.folder} was run with other settings: {changed}. Set them back, or choose "
                "another --name"
            )
