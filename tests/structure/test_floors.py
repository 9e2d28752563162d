"""Imports point down only, and each rule about who may import what has its reason in a message."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = {
    "megatron.config": 0,
    "megatron.plan": 0,
    "megatron.launch": 0,
    "megatron.display": 0,
    "megatron.parallel": 1,
    "megatron.data": 1,
    "megatron.data.prepare": 1,
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
    ("megatron.plan", "megatron.config"),  # it describes what config resolved
    ("megatron.launch", "megatron.config"),  # it starts what config describes
    ("megatron.launch", "megatron.plan"),  # a dry run prints the plan
    ("megatron.launch", "megatron.display"),  # it owns the terminal
    ("megatron.data.prepare", "megatron.data"),  # it makes what training reads
    ("megatron.analysis", "megatron.training"),  # it reads what training wrote
    ("tools", "pretrain_gpt_alcf"),  # a benchmark measures the engine that the entry builds
}

# Files of higher rooms that are known without torch. They stand on floor 0 file by file.
GROUND = {
    "megatron",
    "megatron.checkpoint",
    "megatron.checkpoint.atomic",
    "megatron.data",
    "megatron.data.data_list",
    "megatron.data.hub_names",
    "megatron.data.indexed_header",
    "megatron.data.own_text",
    "megatron.data.survey",
    "megatron.data.text_files",
    "megatron.data.tokenizer_note",
    "megatron.data.vocabulary_size",
    "megatron.model",
    "megatron.model.architecture",
    "megatron.model.registry",
    "megatron.model.gpt2",
    "megatron.model.llama",
    "megatron.model.qwen3",
    "megatron.model.olmo2",
}

WRITER = "megatron.checkpoint.atomic"  # the one writer of files serves every room

# Below training, of config, plan and launch: plain values.
PLAIN = {
    "megatron.config.engine_choice",
    "megatron.config.errors",
    "megatron.config.layout",
    "megatron.config.update_rules",
    "megatron.config.pipeline_stages",
    "megatron.config.rope_scaling",
    "megatron.config.shape",
    "megatron.launch.versions",
    "megatron.display.progress",
}

# Drawn with where it is installed: imported when it is called, and done without elsewhere.
DRAWN = {"megatron.display": "rich"}

FILES = sorted(
    [*ROOT.glob("megatron/**/*.py"), *ROOT.glob("tools/**/*.py"), ROOT / "pretrain_gpt_alcf.py"]
)


def module_name(path: Path) -> str:
    """`megatron/config/flags.py` -> `megatron.config.flags`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def module_of(name: str) -> str:
    """The module that an imported name is, or is taken from."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def part_of(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to, the innermost one."""
    found = [part for part in FLOORS if module == part or module.startswith(f"{part}.")]
    return max(found, key=len, default=None)


def on_the_ground(module: str) -> bool:
    """Whether a module must be importable without torch and numpy."""
    part = part_of(module)
    return module in GROUND or (part is not None and FLOORS[part] == 0)


def syntax(path: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_deferred(node: ast.AST) -> bool:
    """Whether what stands below runs later than the import of the file, or for type checkers."""
    names_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return names_types or isinstance(node, ast.FunctionDef)


def imported(path: Path, *, deferred: bool = True) -> Iterator[str]:
    """Full names of all that a file imports: modules, and names taken from modules.

    Args:
        path: the file.
        deferred: with what functions import when they are called, and type checkers alone.
    """
    nodes: list[ast.AST] = [syntax(path)]
    for node in nodes:
        nodes += [
            child for child in ast.iter_child_nodes(node) if deferred or not is_deferred(child)
        ]
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
    target = module_of(imported_name)
    upper, lower = part_of(importer), part_of(target)
    if lower is None or upper is None or target == WRITER:
        return True
    if FLOORS[upper] == 0 and not on_the_ground(target):
        return False
    if 1 <= FLOORS[upper] <= 3 and FLOORS[lower] == 0:
        return target in PLAIN
    if FLOORS[upper] == 0 and target in GROUND:
        return True
    return lower == upper or (upper, lower) in BESIDE or FLOORS[lower] < FLOORS[upper]


def violations() -> list[str]:
    """Every import that the floors forbid."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in imported(path)
        if not may_import(module_name(path), name)
    ]


def test_every_package_has_a_floor() -> None:
    assert len(FILES) > 50
    assert [
        p for p in FILES if part_of(module_name(p)) is None and module_name(p) != "megatron"
    ] == []


def test_the_files_of_the_ground_exist() -> None:
    assert sorted(GROUND - MODULES.keys()) == []


def test_imports_point_down() -> None:
    assert violations() == []


def test_the_ground_is_loaded_from_the_ground() -> None:
    """A file of a higher room may import the rest of its room when it is called, not before."""
    wrong = [
        f"{MODULES[module].relative_to(ROOT)} imports {name}"
        for module in sorted(MODULES)
        if on_the_ground(module)
        for name in imported(MODULES[module], deferred=False)
        if part_of(module_of(name)) is not None and not on_the_ground(module_of(name))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("importer", "name", "allowed"),
    [
        ("megatron.launch.start", "megatron.config.resolve.resolve", True),
        ("megatron.launch.start", "megatron.plan.report", True),
        ("megatron.plan.report", "megatron.data.survey", True),
        ("megatron.plan.report", "megatron.data.dataset", False),
        ("megatron.plan.report", "megatron.launch.site", False),
        ("megatron.config.schema", "megatron.model.registry.ARCHITECTURES", True),
        ("megatron.config.schema", "megatron.model.stack.Stack", False),
        ("megatron.config.schema", "dataclasses", True),
        ("megatron.config.resolve", "megatron.launch.site.site", False),
        ("megatron.config.resolve", "megatron.plan.memory", False),
        ("megatron.model.registry", "megatron.config.shape.ModelShape", True),
        ("megatron.data.survey", "megatron.data.data_list", True),
        ("megatron.parallel.layers", "megatron.data.indexed", False),
        ("megatron.parallel.layers", "megatron.config.schema.RunConfig", False),
        ("megatron.parallel.groups", "megatron.config.layout.Layout", True),
        ("megatron.data.dataset", "megatron.data.data_list.DataSource", True),
        ("megatron.data.dataset", "megatron.config.errors", True),
        ("megatron.data.dataset", "megatron.config", False),
        ("megatron.data.dataset", "megatron.data.prepare.checks", False),
        ("megatron.data.prepare.checks", "megatron.data.indexed", True),
        ("megatron.data.prepare.checks", "megatron.config.resolve", False),
        ("megatron.model.layer", "megatron.engine", False),
        ("megatron.engine.shards", "megatron.parallel.piece.Piece", True),
        ("megatron.engine.shards", "megatron.checkpoint.tensors", False),
        ("megatron.checkpoint.store", "megatron.engine", False),
        ("megatron.checkpoint.store", "megatron.checkpoint.atomic.write_atomically", True),
        ("megatron.checkpoint.store", "megatron.launch.ranks", False),
        ("megatron.engine", "megatron.training.log", False),
        ("megatron.training.loop", "megatron.engine.Engine", True),
        ("megatron.training.loop", "megatron.analysis.summary", False),
        ("megatron.analysis.summary", "megatron.training.metrics_file", True),
        ("tools.compare_runs", "megatron.training.metrics_file.read", True),
    ],
)
def test_the_rule(importer: str, name: str, allowed: bool) -> None:
    assert may_import(importer, name) is allowed


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        name: {module_of(wanted) for wanted in imported(path, deferred=False)}
        for name, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_only_training_and_what_is_above_it_take_the_whole_configuration() -> None:
    """Lower floors take a shape, a layout, plain values: they serve without a RunConfig."""
    users = [
        str(path.relative_to(ROOT))
        for module, path in MODULES.items()
        if 1 <= FLOORS.get(part_of(module) or "", 0) <= 3
        and any(getattr(node, "id", None) == "RunConfig" for node in ast.walk(syntax(path)))
    ]
    assert users == []


def test_the_lowest_floor_needs_only_the_standard_library() -> None:
    """It runs on login nodes, before there is an environment."""
    wrong = [
        f"{MODULES[module].relative_to(ROOT)} imports {name}"
        for module in sorted(MODULES)
        if on_the_ground(module)
        for name in imported(MODULES[module])  # nothing else when it is called, either
        if name.partition(".")[0]
        not in {*sys.stdlib_module_names, "megatron", DRAWN.get(part_of(module) or "")}
    ]
    assert wrong == []


def bare_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """An interpreter that finds this project and the standard library, nothing else."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "DRY_RUN": "1", "TP": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", ["torch", "numpy", "deepspeed", "safetensors"])
def test_the_bare_interpreter_is_bare(name: str) -> None:
    assert f"No module named '{name}'" in bare_python("-c", f"import {name}").stderr


def test_the_lowest_floor_is_imported_without_torch_and_numpy() -> None:
    modules = sorted(name for name in MODULES if on_the_ground(name))
    assert len(modules) > 40
    result = bare_python("-c", "\n".join(f"import {name}" for name in modules))
    assert result.returncode == 0, result.stderr


def test_a_dry_run_needs_neither_torch_nor_numpy() -> None:
    result = bare_python("-m", "megatron.launch.start")
    assert result.returncode == 0, result.stderr
    assert "-m megatron.launch -n 2 -- " in result.stdout


WALL = {
    "_hp_mapping", "bit16_groups", "fp16_groups", "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition", "fp32_partitioned_groups_flat", "ds_tensor", "ds_numel",
    "ds_shape", "grad_position", "ds_pipe_replicated", "update_lp_params",
    "grad_partitions_flat_buffer", "_reassign_or_swap_out_partitioned_parameters",
    "zero_optimizer", "get_param_id", "was_step_applied",
}  # fmt: skip
"""Names inside DeepSpeed that are refused outside engine/, beside those found by `inside_names`."""

OUR_OWN = {"tensor_model_parallel"}  # set by parallel/layers.py: DeepSpeed reads what we write


def words(files: Iterable[Path]) -> set[str]:
    """Every identifier-like word of some files."""
    return {word for file in files for word in re.findall(r"\w+", file.read_text(errors="replace"))}


def attributes(path: Path) -> set[str]:
    """Attributes that a file reads or sets of anything but `self`, by name or by string."""
    found = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
            found.add(node.attr)
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            by_string = ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr")
            if by_string and isinstance(node.args[1], ast.Constant):
                found.add(node.args[1].value)
    return found


def defined(path: Path) -> set[str]:
    """Functions, classes and annotated fields of a file."""
    found = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target).rpartition(".")[2])
    return found


def library(name: str) -> Path:
    """Folder of an installed package."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def inside_names() -> Set[str]:
    """Names that engine/ uses of DeepSpeed's insides: DeepSpeed's, not torch's, not our own."""
    used = {n for m, p in MODULES.items() if m.startswith("megatron.engine") for n in attributes(p)}
    ours = {name for path in FILES for name in defined(path)}
    deepspeed = words((library("deepspeed") / "runtime").rglob("*.py"))
    return (used & deepspeed) - words(library("torch").rglob("*.py")) - ours - OUR_OWN


def test_the_wall_is_derived_from_what_the_engine_reads(inside_names: Set[str]) -> None:
    assert {"grad_position", "_hp_mapping", "ds_numel", "update_lp_params"} <= inside_names
    assert not inside_names & {"loss", "step", "train_batch", "param_groups"}


def test_deepspeed_and_its_insides_stay_in_the_engine(inside_names: Set[str]) -> None:
    """Then another release of DeepSpeed, or another engine, changes one folder."""
    outside = {m: p for m, p in MODULES.items() if not m.startswith("megatron.engine")}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in outside.values()
        for name in imported(path)
        if name.partition(".")[0] == "deepspeed"
    ]
    found += [
        f"{path.relative_to(ROOT)} uses {name}"
        for path in outside.values()
        for name in sorted(attributes(path) & (inside_names | WALL))
    ]
    assert found == []


ONE_NAME_TWICE = {
    "engine": "the package and the file of the class it is for",
    "IntArray": "the same type: numpy's int64 array",
    "FloatArray": "the same type: numpy's float64 array",
    "Log": "the same type: takes a line",
    "Shares": "the same type: of train, validation and test",
}


def names_of_types(path: Path) -> Iterator[str]:
    """Public classes and type aliases of a file."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        else:
            continue
        if re.match(r"[A-Z][a-z]", name):
            yield name


def test_no_two_types_and_no_two_modules_have_one_name() -> None:
    """A reader who greps for a name finds one thing."""
    places: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        if module.startswith("megatron."):
            places[module.rpartition(".")[2]].add(module)
            for name in names_of_types(path):
                places[name].add(module)
    twice = {name: sorted(where) for name, where in places.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if name not in ONE_NAME_TWICE} == {}


def test_the_environment_is_read_where_runs_are_started() -> None:
    """Elsewhere on the lowest floor it is an argument: seen by readers, set by tests."""
    readers = set()
    for path in FILES:
        if on_the_ground(module_name(path)):
            uses = (n for n in ast.walk(syntax(path)) if isinstance(n, ast.Attribute | ast.Name))
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
