"""The README says what is true: its table is the schema, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

from megatron.config.table import with_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_options_table_is_the_schema() -> None:
    assert with_table(README) == README, "run: python3 -m megatron.config.table"


def test_files_it_names_exist() -> None:
    named = set(re.findall(r"`((?:tools|docs|ALCF|tests|\.ci)/[\w./-]+)`", README))
    named |= set(re.findall(r"(?:python3|bash) ((?:tools|tests)/[\w./]+)", README))
    assert len(named) > 8
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


def test_modules_of_the_tour_exist() -> None:
    tour = README[README.index("**One step's way") : README.index("## Extend it")]
    parts = set(re.findall(r"`((?:training|config|data|model|parallel|checkpoint)/\w+\.py)`", tour))
    assert len(parts) > 10
    missing = [part for part in sorted(parts) if not (ROOT / "megatron" / part).exists()]
    assert not missing
