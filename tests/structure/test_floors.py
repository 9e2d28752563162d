"""Imports point down only, and each rule about who may import what has its reason in a message."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = {
    "megatron.config": 0,
    "megatron.plan": 0,
    "megatron.launch": 0,
    "megatron.parallel": 1,
    "megatron.data": 1,
    "megatron.model": 2,
    "megatron.engine": 3,
    "megatron.checkpoint": 3,
    "megatron.training": 4,
    "megatron.analysis": 4,
    "pretrain_gpt_alcf": 5,
    "tools": 5,
}

# A floor below may be imported whole; beside it nothing, except:
BESIDE = {
    ("megatron.launch", "megatron.config"),  # it starts what config describes
    ("megatron.engine", "megatron.checkpoint"),  # it writes its weights back after a load
}

# Of floor 0, floors 1 and 2 take plain numbers, except what reads files and the errors.
PLAIN = ("megatron.parallel", "megatron.data", "megatron.model")
FOR_PLAIN = {
    "megatron.config.atomic",
    "megatron.config.errors",
    "megatron.data.data_list",
    "megatron.data.indexed_header",
    "megatron.data.vocabulary_size",
    "megatron.config.formulas",
    "megatron.config.rope_scaling",
    "megatron.config.pipeline_stages",
}

FILES = sorted(
    [*ROOT.glob("megatron/**/*.py"), *ROOT.glob("tools/**/*.py"), ROOT / "pretrain_gpt_alcf.py"]
)


def module_name(path: Path) -> str:
    """`megatron/config/flags.py` -> `megatron.config.flags`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to."""
    return next((part for part in FLOORS if module == part or module.startswith(f"{part}.")), None)


def imported(path: Path) -> Iterator[str]:
    """Full names of all that a file imports: modules, and names taken from modules."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            by_name = called in ("import_module", "__import__") and node.args
            if by_name and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def may_import(importer: str, imported_name: str) -> bool:
    """Whether the floors allow `importer` to import `imported_name`."""
    lower = part_of(imported_name)
    upper = part_of(importer)
    if lower is None or upper is None or lower == upper or (upper, lower) in BESIDE:
        return True
    if lower == "megatron.config" and upper in PLAIN:
        return any(
            imported_name == allowed or imported_name.startswith(f"{allowed}.")
            for allowed in FOR_PLAIN
        )
    return FLOORS[lower] < FLOORS[upper]


def test_every_package_has_a_floor() -> None:
    assert len(FILES) > 50
    assert [
        p for p in FILES if part_of(module_name(p)) is None and module_name(p) != "megatron"
    ] == []


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in imported(path)
        if not may_import(module_name(path), name)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("importer", "name", "allowed"),
    [
        ("megatron.launch.start", "megatron.config.resolve.resolve", True),
        ("megatron.config.resolve", "megatron.launch.site.site", False),
        ("megatron.parallel.layers", "megatron.data.indexed", False),
        ("megatron.parallel.layers", "megatron.config.schema.RunConfig", False),
        ("megatron.data.dataset", "megatron.data.data_list.DataSource", True),
        ("megatron.data.dataset", "megatron.config.errors", True),
        ("megatron.data.dataset", "megatron.config", False),
        ("megatron.model.llama", "megatron.engine", False),
        ("megatron.checkpoint.store", "megatron.engine", False),
        ("megatron.training.loop", "megatron.engine.Engine", True),
        ("megatron.engine", "megatron.training.log", False),
        ("tools.compare_runs", "megatron.training.metrics_file.read", True),
        ("megatron.config.schema", "dataclasses", True),
    ],
)
def test_the_rule(importer: str, name: str, allowed: bool) -> None:
    assert may_import(importer, name) is allowed


def test_the_lowest_floor_needs_only_the_standard_library() -> None:
    """It runs on login nodes, before there is an environment."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in imported(path)
        if part_of(module_name(path)) in ("megatron.config", "megatron.launch")
        and name.partition(".")[0] not in {*sys.stdlib_module_names, "megatron"}
    ]
    assert wrong == []


def test_deepspeed_lives_behind_one_package() -> None:
    importers = {
        part_of(module_name(path))
        for path in FILES
        for name in imported(path)
        if name.partition(".")[0] == "deepspeed"
    }
    assert importers == {"megatron.engine"}


def test_the_environment_is_read_where_runs_are_started() -> None:
    """Elsewhere on the lowest floor it is an argument: seen by readers, set by tests."""
    readers = set()
    for path in FILES:
        if part_of(module_name(path)) in ("megatron.config", "megatron.launch"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            uses = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name))
            if any(ast.unparse(node) in ("os.environ", "os.getenv", "environb") for node in uses):
                readers.add(path.name)
    assert readers == {"start.py", "__main__.py"}


def test_sources_are_ascii() -> None:
    kinds = (
        "megatron/**/*.py",
        "tools/**/*.py",
        "tests/**/*.py",
        "tests/**/*.sh",
        "ALCF/*",
        "*.py",
        "*.sh",
    )
    files = [path for kind in kinds for path in ROOT.glob(kind) if path.is_file()]
    wrong = [str(path.relative_to(ROOT)) for path in files if not path.read_bytes().isascii()]
    assert wrong == []
