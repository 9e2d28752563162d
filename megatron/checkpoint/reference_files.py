"""The files of a Megatron-DeepSpeed checkpoint: each parameter's tensor-parallel slices, as stored.

Four forms: model files with ZeRO 0-2 (`mp_rank_*`), pipeline layers (`layer_*-model_*`), ZeRO 3
(`zero_pp_rank_*_model_states.pt`) and Universal (`zero/<parameter>/fp32.pt`). Names and shapes stay
the writer's; reference.py gives them their meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import torch_file
from megatron.parallel.piece import WEIGHT

FP32 = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS_ONLY = "--weights-only"

Read = Callable[[str], Tensor]
"""State (`weight`, or one of MOMENTS) -> a slice, in the shape it had on its rank."""
Slices = dict[str, dict[int, Read]]
"""Parameter, as it is called there -> tensor-parallel rank -> its slice."""

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_ZERO_MODEL = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass(frozen=True)
class Reference:
    """A checkpoint of one step.

    Attributes:
        folder: of the step.
        form: in words.
        head: what it holds beside tensors: `args`, `iteration`, `tokens` ...
        tensor_parallel: slices of a sharded parameter.
        weights: slices with the state `weight`.
        model: the model's own copies of the same, in its precision; empty where there are none.
        step: of the optimizer, where `weights` have its moments too; else None.
        packed: Universal parameter -> whether all of gate lies before all of up.
    """

    folder: Path
    form: str
    head: Mapping[str, Any]
    tensor_parallel: int
    weights: Slices
    model: Slices
    step: float | None
    packed: Mapping[str, bool]


def step_folder(folder: Path) -> Path:
    """The folder of the step that the writer's own trackers name; the newest without them.

    Raises:
        ValueError: there is none.
    """
    if (folder / "zero").is_dir() or any(folder.glob("*_model_states.pt")):
        return folder
    for tracker, form in (
        ("latest", "{}"),
        ("latest_universal", "{}"),
        ("latest_checkpointed_iteration.txt", "global_step{}"),
    ):
        if (folder / tracker).is_file():
            named = folder / form.format((folder / tracker).read_text(encoding="utf-8").strip())
            if not named.is_dir():
                raise ValueError(f"{folder / tracker} names {named.name}, which is not there")
            return named
    steps = [path for path in folder.glob("global_step*") if path.is_dir()]
    if not steps:
        raise ValueError(f"{folder} holds no checkpoint of Megatron-DeepSpeed (global_step*)")
    return max(steps, key=lambda path: int("0" + re.sub(r"\D", "", path.name)))


def open_reference(folder: Path, *, weights_only: bool) -> Reference:
    """The checkpoint in a folder.

    Args:
        folder: of a step, or of all steps of a run.
        weights_only: leave the optimizer's files alone. Weights then have the model's precision,
            but for ZeRO 3 and Universal, which have fp32 ones only.

    Raises:
        ValueError: a file is missing, damaged, or of another checkpoint than the rest.
    """
    folder = step_folder(folder)
    if (folder / "zero").is_dir():
        return _universal(folder, weights_only)
    files = sorted(path.name for path in folder.iterdir())
    layers = _matching(files, _LAYER)
    sharded = {(mp, dp): name for (dp, mp), name in _matching(files, _ZERO_MODEL).items()}
    heads = {mp: name for (mp, dp), name in sharded.items() if dp == 0} or {
        mp: name for (mp,), name in _matching(files, _MODEL).items()
    }
    _require_all(folder, "mp_rank", heads)
    opened = {mp: torch_file.read(folder / heads[mp]) for mp in sorted(heads)}
    _require_alike(folder, {heads[mp]: head for mp, head in opened.items()})
    tp = 1 + max(tp for _, tp in layers) if layers else len(opened)
    if len(opened) % tp:
        raise ValueError(f"{folder}: {len(opened)} model files are no multiple of {tp} slices")
    model: Slices = {}
    if layers:
        for (layer, rank), name in layers.items():
            _add(model, torch_file.read(folder / name), rank, f"{layer}.")
    elif not sharded:
        for mp, head in opened.items():
            _add(model, _module(folder / heads[mp], head), mp)
    form = f"TP {tp}, PP {len(opened) // tp}, ZeRO {3 if sharded else '0-2'}"
    if weights_only and not sharded:
        return Reference(folder, form, opened[0], tp, model, {}, None, {})
    grid = {(mp, dp): name for (dp, mp), name in _matching(files, _OPTIMIZER).items()}
    if not grid:
        raise ValueError(
            f"{folder} holds no *_optim_states.pt: {WEIGHTS_ONLY} imports the weights without the "
            "optimizer's states"
        )
    shapes = {mp: _shapes(head, model, mp % tp) for mp, head in opened.items()}
    weights, steps = _partitioned(folder, grid, shapes, tp, 3 if sharded else 1, weights_only)
    _require_covered(folder, weights, model)
    step = None if weights_only else _one_step(folder, steps, opened[0])
    return Reference(folder, form, opened[0], tp, weights, model, step, {})


def _universal(folder: Path, weights_only: bool) -> Reference:
    heads = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not heads:
        raise ValueError(
            f"{folder} holds no mp_rank_00_model_states.pt, which has the shape of the model"
        )
    head = torch_file.read(heads[0])
    weights: Slices = {}
    packed, steps = {}, set()
    for path in sorted(one.parent for one in folder.glob("zero/*/fp32.pt")):
        about = torch_file.read(path / "fp32.pt")
        packed[path.name] = about.get("param_n_sub_params") == 2
        weights[path.name] = {0: partial(_universal_state, path)}
        if not weights_only:
            missing = [one for one in MOMENTS if not (path / f"{one}.pt").is_file()]
            if missing:
                raise ValueError(
                    f"{path / missing[0]}.pt is missing: {WEIGHTS_ONLY} imports the weights alone"
                )
            steps |= _universal_step(path / "step.pt")
    step = None if weights_only else _one_step(folder, steps, head)
    return Reference(folder, "Universal", head, 1, weights, {}, step, packed)


def _universal_state(path: Path, state: str) -> Tensor:
    file = path / f"{FP32 if state == WEIGHT else state}.pt"
    return _tensor(torch_file.read(file).get("param"), f"{file}: param")


def _universal_step(path: Path) -> set[float]:
    return {float(torch_file.load(path))} if path.is_file() else set()


def _matching(names: list[str], pattern: re.Pattern[str]) -> dict[tuple[int, ...], str]:
    matches = ((pattern.fullmatch(name), name) for name in names)
    return {tuple(map(int, found.groups())): name for found, name in matches if found}


def _require_all(folder: Path, what: str, found: Mapping[int, str]) -> None:
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise ValueError(f"{folder}: the model file of {what} {missing[0]:02d} is missing")


def _require_alike(folder: Path, heads: Mapping[str, Mapping[str, Any]]) -> None:
    """All files are of one step and one layout."""
    first, *others = heads
    for name in others:
        ours, theirs = heads[first].get("iteration"), heads[name].get("iteration")
        if ours != theirs:
            raise ValueError(
                f"{folder}: {first} is of iteration {ours}, {name} of {theirs}: files of two "
                "checkpoints are mixed"
            )
    args = vars(heads[first].get("args") or torch_file.Inert())
    tp, pp = (args.get(f"{one}_model_parallel_size") for one in ("tensor", "pipeline"))
    if tp and pp and tp * pp != len(heads):
        raise ValueError(
            f"{folder}: {first} says TP={tp} x PP={pp} = {tp * pp} model files, {len(heads)} are "
            "there"
        )


def _module(path: Path, head: Mapping[str, Any]) -> Mapping[str, Any]:
    module = head.get("module")
    if not isinstance(module, dict) or not module:
        raise ValueError(f"{path} holds no weights (`module`)")
    return module


def _add(slices: Slices, values: Mapping[str, Any], rank: int, prefix: str = "") -> None:
    """Adds nested tensors under their names joined by dots."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _add(slices, value, rank, f"{name}.")
        elif isinstance(value, Tensor):
            slices.setdefault(name.removeprefix("module."), {}).setdefault(
                rank, partial(_own, value)
            )


def _own(value: Tensor, state: str) -> Tensor:
    assert state == WEIGHT
    return value


def _shapes(head: Mapping[str, Any], model: Slices, rank: int) -> list[dict[str, tuple[int, ...]]]:
    """Parameter -> shape on this rank, by group of the optimizer; by the model where not stored."""
    stored = head.get("param_shapes")
    if stored:
        return [{name: tuple(shape) for name, shape in group.items()} for group in stored]
    known = {name: tuple(own[rank](WEIGHT).shape) for name, own in model.items() if rank in own}
    return [known]


def _partitioned(
    folder: Path,
    grid: Mapping[tuple[int, int], str],
    shapes: Mapping[int, list[dict[str, tuple[int, ...]]]],
    tp: int,
    stage: int,
    weights_only: bool,
) -> tuple[Slices, set[float]]:
    """The slices that the data-parallel ranks' flat partitions hold, and the optimizer's steps."""
    weights: Slices = {}
    steps: set[float] = set()
    for mp, groups in shapes.items():
        files = [grid[mp, dp] for dp in _data_ranks(folder, grid, mp)]
        runs: dict[str, list[_Run]] = {}
        for number, name in enumerate(files):
            path = folder / name
            content = torch_file.read(path).get("optimizer_state_dict")
            if not isinstance(content, dict):
                raise ValueError(f"{path} holds no optimizer_state_dict")
            _require_count(path, content, len(files))
            parts = _partitions(path, content, stage, weights_only)
            steps |= {part.step for part in parts if part.step is not None}
            found = (
                _even_runs(path, parts, groups, number, len(files))
                if stage == 3
                else _mapped_runs(path, parts, content)
            )
            for parameter, run in found:
                runs.setdefault(parameter, []).append(run)
        known = {name: shape for group in groups for name, shape in group.items()}
        for parameter, parts_of in runs.items():
            if parameter not in known:
                raise ValueError(f"{folder / files[0]}: {parameter} is not in the model's files")
            slice_ = partial(_joined, parts_of, known[parameter], f"{folder}: {parameter}")
            weights.setdefault(parameter, {}).setdefault(mp % tp, slice_)
    return weights, steps


def _data_ranks(folder: Path, grid: Mapping[tuple[int, int], str], mp: int) -> range:
    ranks = [dp for rank, dp in grid if rank == mp]
    missing = sorted(set(range(max(ranks, default=0) + 1)) - set(ranks))
    if missing:
        raise ValueError(
            f"{folder}: the optimizer's file of data-parallel rank {missing[0]}, mp_rank {mp:02d} "
            f"is missing; {WEIGHTS_ONLY} imports the weights without it"
        )
    return range(len(ranks))


@dataclass(frozen=True)
class _Partition:
    """One rank's flat values of one parameter group, by state."""

    values: Mapping[str, Tensor]
    step: float | None


@dataclass(frozen=True)
class _Run:
    """A part of a parameter in a partition."""

    partition: _Partition
    start: int
    length: int


def _require_count(path: Path, content: Mapping[str, Any], files: int) -> None:
    partitions = content.get("partition_count", files)
    partitions = max(partitions) if isinstance(partitions, list) else partitions
    if partitions != files:
        raise ValueError(
            f"{path} was written by {partitions} data-parallel ranks, but {files} files are there; "
            f"{WEIGHTS_ONLY} imports the weights without them"
        )


def _partitions(
    path: Path, content: Mapping[str, Any], stage: int, weights_only: bool
) -> list[_Partition]:
    """A rank's partitions, one per parameter group."""
    flat = content.get("fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups")
    base = content.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    if flat is None or base is None:
        raise ValueError(
            f"{path} holds no fp32 partitions of ZeRO {'3' if stage == 3 else '1 or 2'}"
        )
    states = base["state"] if isinstance(base, dict) else base
    groups = base.get("param_groups", []) if isinstance(base, dict) else []
    result = []
    for number, weight in enumerate(flat):
        values = {WEIGHT: _tensor(weight, f"{path}: group {number}")}
        kept = states[number] if number < len(states) else {}
        step = kept.get("step", content.get("base_optimizer_state_step"))
        if step is None and number < len(groups):
            step = groups[number].get("step")
        if not weights_only:
            missing = [name for name in MOMENTS if not isinstance(kept.get(name), Tensor)]
            if missing:
                raise ValueError(
                    f"{path}: group {number} has no {missing[0]}, so it is not of Adam; "
                    f"{WEIGHTS_ONLY} imports the weights alone"
                )
            values |= {name: kept[name].reshape(-1) for name in MOMENTS}
        result.append(_Partition(values, None if step is None else float(step)))
    return result


def _mapped_runs(
    path: Path, parts: list[_Partition], content: Mapping[str, Any]
) -> Iterator[tuple[str, _Run]]:
    """ZeRO 1 and 2: each file says which runs it has."""
    mappings = content.get("param_slice_mappings")
    if mappings is None:
        raise ValueError(
            f"{path} says not which parameters it holds (no param_slice_mappings; its DeepSpeed is "
            f"older than 0.8): {WEIGHTS_ONLY} imports the weights alone"
        )
    _require_groups(path, len(parts), len(mappings))
    for part, mapping in zip(parts, mappings, strict=True):
        for name, address in mapping.items():
            yield name, _Run(part, int(address.start), int(address.numel))


def _even_runs(
    path: Path,
    parts: list[_Partition],
    groups: list[dict[str, tuple[int, ...]]],
    rank: int,
    ranks: int,
) -> Iterator[tuple[str, _Run]]:
    """ZeRO 3: each parameter is divided evenly, the last part padded."""
    _require_groups(path, len(parts), len(groups))
    for part, shapes in zip(parts, groups, strict=True):
        start = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            each = -(-size // ranks)
            yield name, _Run(part, start, max(0, min(each, size - rank * each)))
            start += each


def _require_groups(path: Path, found: int, named: int) -> None:
    if found != named:
        raise ValueError(f"{path} holds {found} parameter groups, but names those of {named}")


def _joined(runs: list[_Run], shape: tuple[int, ...], what: str, state: str) -> Tensor:
    """A slice from its runs in all partitions."""
    values = [run.partition.values[state][run.start : run.start + run.length] for run in runs]
    found, size = sum(value.numel() for value in values), math.prod(shape)
    if found != size:
        raise ValueError(f"{what}: the partitions hold {found:,} of {size:,} elements of {state}")
    return torch.cat(values).view(shape)


def _require_covered(folder: Path, weights: Slices, model: Slices) -> None:
    """The optimizer's files hold every parameter of the model, but for copies of a tied one."""
    tied = any(name.startswith("tied_modules.") for name in weights)
    missing = [
        name
        for name in model
        if name not in weights and not (tied and name.endswith(".word_embeddings.weight"))
    ]
    if missing:
        raise ValueError(
            f"{folder}: the optimizer's files do not hold {missing[0]}; {WEIGHTS_ONLY} imports the "
            "weights alone"
        )


def _one_step(folder: Path, steps: set[float], head: Mapping[str, Any]) -> float:
    """The optimizer's step, the same of all parameters; the iteration where none is stored."""
    if len(steps) > 1:
        raise ValueError(f"{folder}: the optimizer's files are of steps {sorted(steps)}: mixed")
    return next(iter(steps), float(head.get("iteration") or 0))


def _tensor(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is no tensor")
    return value
