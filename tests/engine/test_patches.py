"""The list of changes to DeepSpeed is true: each name exists, each change is needed or compared."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megatron.config.errors import ConfigError
from megatron.engine import pipeline, zero
from megatron.engine.patches import (
    PATCHES,
    Patch,
    fill_tables,
    members_group,
    patch_cpu_accelerator,
    patch_new_group,
    require_accelerator,
)
from tests.equivalence import front
from tests.equivalence.case import Case
from tests.spawn import run

ROOT = Path(__file__).resolve().parents[2]


def found(name: str) -> Any:
    """The object of a dotted name: the longest part of it that is a module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            thing = getattr(thing, attribute)
        return thing
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.theirs.rpartition(".")[2])
def test_the_names_of_a_patch_exist(patch: Patch) -> None:
    assert patch.theirs.startswith("deepspeed.") and patch.ours.startswith("megatron.engine.")
    found(patch.theirs)
    assert callable(found(patch.ours))
    for path in re.findall(r"tests/\S+\.py", patch.drop_when):
        assert (ROOT / path).exists(), path


def test_another_kind_of_device_than_deepspeeds_is_refused() -> None:
    require_accelerator(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"DeepSpeed has chosen cpu .*set DEVICE=cuda"):
        require_accelerator(torch.device("cuda", 0))


# --- new_group ------------------------------------------------------------------------------------


def groups_made() -> tuple[bool, bool, bool]:
    """Inside the patch a rank asks for a group that another rank is in, and for one of all."""
    front.start_distributed("gloo", dist.get_rank(), 2, 0, "", 60)
    theirs = deepspeed.comm.new_group
    with patch_new_group():
        other = deepspeed.comm.new_group([1 - dist.get_rank()])
        everyone = deepspeed.comm.new_group([0, 1])
    return (
        other == dist.GroupMember.NON_GROUP_MEMBER,
        everyone is dist.group.WORLD,
        deepspeed.comm.new_group is theirs and theirs is not members_group,
    )


def test_a_rank_makes_no_group_of_others() -> None:
    """Unpatched the two ranks would wait for each other, one in each group."""
    assert run(groups_made, 2) == [(True, True, True)] * 2


# --- Tables of partitions -------------------------------------------------------------------------

TABLES = (
    "param_to_partition_ids",
    "total_grads_in_partition",
    "remaining_grads_in_partition",
    "is_partition_reduced",
    "is_grad_computed",
    "grad_partition_insertion_offset",
    "grad_start_offset",
    "first_param_index_in_partition",
)


def both_tables(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """DeepSpeed's tables and ours, of an engine's own parameters."""
    optimizer = front.build(front.run_config(case.variables() | {"ENGINE": "deepspeed"}))._zero
    results = []
    for fill in (
        DeepSpeedZeroOptimizer.initialize_gradient_partitioning_data_structures,
        fill_tables,
    ):
        for table in TABLES:
            setattr(optimizer, table, {})
        fill(optimizer)
        results.append({table: copy.deepcopy(getattr(optimizer, table)) for table in TABLES})
    return results[0], results[1]


@pytest.mark.parametrize("case", [Case(), Case(dp=2), Case(dp=4, zero_stage=2), Case(tp=2, dp=2)])
def test_same_tables(case: Case) -> None:
    for expected, made in run(both_tables, case.world, case):
        assert made == expected
        places = expected["param_to_partition_ids"].values()
        assert case.dp == 1 or any(len(ids) > 1 for group in places for ids in group.values())


def test_every_rank_has_parameters_in_the_test() -> None:
    expected, _ = run(both_tables, 4, Case(dp=4))[0]
    assert any(
        all(count > 0 for count in x.values())
        for x in expected["total_grads_in_partition"].values()
    )


# --- The norm over stages -------------------------------------------------------------------------


def norm_reductions(case: Case, patched: bool) -> int:
    """All-reduces over the stages that a norm takes on this rank, without taking part in them."""
    if not patched:
        pipeline.patch_global_grad_norm = lambda optimizer, device: None
    config = front.run_config(case.variables())
    engine = front.build(config)
    if patched:
        front.steps(config, engine, 0, 1)
    optimizer = engine._zero
    for group, parameters in enumerate(optimizer.params_in_partition):
        optimizer.averaged_gradients[group] = [p.detach().clone() for p in parameters]
    calls: list[Any] = []
    optimizer._model_parallel_all_reduce = lambda tensor, op: calls.append(tensor)
    optimizer.scaled_global_norm()
    return len(calls)


def test_stages_with_other_parameter_groups_take_part_in_one_norm() -> None:
    """DeepSpeed's own norm has as many collectives as a stage has groups: they never meet."""
    case = Case(pp=3, gas=2)
    assert len(set(run(norm_reductions, 3, case, False))) > 1
    assert run(norm_reductions, 3, case, True) == [1, 1, 1]


# --- A host without accelerator -------------------------------------------------------------------


def test_a_host_starts_in_fp16_and_without_a_compiler() -> None:
    patch_cpu_accelerator()
    assert deepspeed.get_accelerator().is_fp16_supported()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_the_step_enters_no_file_of_another_axis() -> None:
    """A dense step at PP = 1 is read in the files of its engine."""
    own = {"sharded.py", "one_stage.py", "reduction.py", "buckets.py", "gathering.py"}
    assert run(entered, 1, Case(gas=2).variables()) == [own]


def entered(variables: dict[str, str]) -> set[str]:
    """Files of the engine that a step's calls enter."""
    import sys

    config = front.run_config(variables)
    engine = front.build(config)
    front.steps(config, engine, 0, 1)
    folder, files = Path(zero.__file__).parent, set()

    def note(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.parent == folder:
            files.add(path.name)

    sys.setprofile(note)
    try:
        front.steps(config, engine, 1, 2)
    finally:
        sys.setprofile(None)
    return files
