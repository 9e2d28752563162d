"""The pages say what is true: the table is the schema, the commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


PAGES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/numerics.md")


@pytest.mark.parametrize("page", PAGES)
def test_modules_it_names_exist(page: str) -> None:
    named = set(re.findall(r"[\w./]+/\w+\.py\b", (ROOT / page).read_text(encoding="utf-8")))
    assert len(named) > 2
    roots = (ROOT, ROOT / "megatron", ROOT / "tests")
    missing = [name for name in sorted(named) if not any((root / name).exists() for root in roots)]
    assert not missing
