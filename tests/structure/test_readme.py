"""The pages say what is true: the table is the schema; files, commands, tests and floors exist."""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from pathlib import Path

import pytest

from megatron.analysis.finish import NOT_SAVED
from megatron.config.errors import ConfigError, DataError, MissingCheckpoint
from megatron.config.table import with_table
from megatron.launch.process import HUNG
from megatron.training.guard import Unstable
from tests.structure.count import JOURNEYS
from tests.structure.test_floors import FLOORS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PAGES = [
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "ALCF/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def text_of(page: str) -> str:
    """A page without the option table, which has a test of its own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.partition("<!-- options:")[0]


def test_options_table_is_the_schema() -> None:
    assert with_table(README) == README, "run: python3 -m megatron.config.table"


def test_there_are_pages() -> None:
    assert {"README.md", "docs/numerics.md", "docs/benchmarks/data.md"} <= {*PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_files_it_names_exist(page: str) -> None:
    named = set(re.findall(r"`((?:tools|docs|ALCF|tests|\.ci)/[\w./*-]+)", text_of(page)))
    assert [name for name in sorted(named) if not [*ROOT.glob(name.rstrip("/"))]] == []


@pytest.mark.parametrize("page", PAGES)
def test_modules_it_names_exist(page: str) -> None:
    named = set(re.findall(r"[\w./]+/\w+\.py\b", text_of(page)))
    roots = (ROOT, ROOT / "megatron", ROOT / "megatron/engine", ROOT / "tests", ROOT / "tests/data")
    missing = [name for name in sorted(named) if not any((root / name).exists() for root in roots)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_it_names_exist(page: str) -> None:
    scripts = set(re.findall(r"(?:python3?|bash) ([\w./]*\w\.(?:py|sh)|\.ci/run)", text_of(page)))
    modules = set(re.findall(r"python3? -m (megatron[\w.]*|tests[\w.]*)", text_of(page)))
    scripts.discard("my_script.py")
    assert [name for name in sorted(scripts) if not (ROOT / name).is_file()] == []
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []


# tools/test_dist.py is no test; those of the tools are in tests/tools/.
TEST = r"(?:(?<!tools/)|(?<=tests/tools/))(test_\w+\.py)|::(test_\w+)"


@pytest.mark.parametrize("page", PAGES)
def test_tests_it_names_exist(page: str) -> None:
    """`test_file.py`, and after it `::test_name` of that file, also as `; ::test_name` alone."""
    files: dict[str, str] = {}
    for path in ROOT.glob("tests/**/test_*.py"):  # two rooms may have a file of one name
        files[path.name] = files.get(path.name, "") + path.read_text()
    files |= {path.name: "" for path in ROOT.glob("tests/**/*.py") if path.name not in files}
    wrong, last = [], ""
    for name, function in re.findall(TEST, text_of(page)):
        if name:
            last = name
            wrong += [name] * (name not in files)
        elif f"def {function}(" not in files.get(last, ""):
            wrong.append(f"{last}::{function}")
    assert wrong == []


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_house_is_that_of_the_floors(page: str) -> None:
    """The drawing has every room on its floor; a line without a number belongs to the last one."""
    room = re.compile(r"(megatron/\w+|pretrain_gpt_alcf|tools)(?:/|\.py)")
    drawn: dict[int, set[str]] = defaultdict(set)
    (drawing,) = re.findall(r"```\n([^`]*megatron/plan/[^`]*)```", text_of(page))
    floor = -1
    for line in drawing.splitlines():
        number = re.match(r"\s*(\d) ", line)
        floor = int(number[1]) if number else floor
        if floor >= 0:
            drawn[floor] |= set(room.findall(line))
    floors: dict[int, set[str]] = defaultdict(set)
    for package, its_floor in FLOORS.items():
        floors[its_floor] |= {package.replace(".", "/")} - {"megatron/data/prepare"}
    assert drawn == floors
    assert "data/prepare/" in drawing


def rows(page: str, head: str) -> list[str]:
    """The rows of the table whose first line begins with `head`."""
    _, _, table = page.partition(f"\n{head}")
    lines = table.split("\n\n")[0].splitlines()
    return lines[2:]  # the head's rest, and the line of dashes


def test_limits_are_those_that_are_counted() -> None:
    step, save, setting = (row.split("|")[3].strip() for row in rows(ARCHITECTURE, "| way | now"))
    assert step == f"{JOURNEYS['step'].files}, {JOURNEYS['step'].lines:,}"
    assert save == f"{JOURNEYS['save'].files} in {JOURNEYS['save'].folders}"
    assert setting == f"{JOURNEYS['setting'].files}"


def test_each_kind_of_change_is_shown_by_a_test_and_its_table_exists() -> None:
    changes = rows(ARCHITECTURE, "| change | place")
    shown = (ROOT / "tests/structure/test_extend.py").read_text(encoding="utf-8")
    assert len(changes) == len(re.findall(r"^def test_", shown, re.M))
    for change in changes:
        files = [ROOT / "megatron" / name for name in re.findall(r"`(\w+/\w+\.py)`", change)]
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        for table in re.findall(r"\b(?:in|of) ([A-Z_]{5,})\b", change):
            assert re.search(rf"^{table}\b", source, re.M), change


def test_exit_statuses_are_those_of_the_program() -> None:
    statuses = [row.split("|")[1].strip() for row in rows(README, "| status | meaning")]
    errors = (ConfigError, DataError, MissingCheckpoint, Unstable)
    numbers = [*(error.exit_status for error in errors), NOT_SAVED, HUNG]
    assert statuses == ["0", *map(str, numbers), "128 + n"]


def test_architectures_and_presets_it_names_exist() -> None:
    from megatron.config.presets import PRESETS
    from megatron.model.registry import ARCHITECTURES

    assert [name for name in ARCHITECTURES if f"`{name}`" not in README] == []
    named = set(re.findall(r"MODEL_ARCH=([\w.-]+)", text_of("README.md")))
    assert named <= PRESETS.keys()
