"""Partitioned initialisation, hpZ, MiCS and the optimizer on the host change no number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import megatron.engine as engine_package
from megatron.checkpoint import store
from megatron.config.schema import RunConfig
from megatron.engine import Engine
from megatron.parallel import layers
from megatron.plan.memory import memory_per_rank
from tests.equivalence import front
from tests.spawn import run

COMMON = {"GLOBAL_BATCH": "16", "LR": "0.5", "CLIP_GRAD": "0.3", "NLAYERS": "2"}
STEPS = 5
LONG = pytest.mark.long

SHARDED = {"WORLD_SIZE": "4", "ZERO_STAGE": "3"}
OFFLOADED = {"WORLD_SIZE": "2", "CPU_OPTIMIZER": "1"}
LAYOUTS = {
    "zero3": SHARDED,
    "zero3-alone": {**SHARDED, "WORLD_SIZE": "1"},
    "zero3-tp2": {**SHARDED, "WORLD_SIZE": "2", "TP": "2"},  # one data-parallel rank
    "mics-of-all": {**SHARDED, "WORLD_SIZE": "2", "MICS_SHARD_SIZE": "2"},
    "hpz": {**SHARDED, "ZERO_HPZ_PARTITION_SIZE": "2"},
    "hpz-of-all": {**SHARDED, "WORLD_SIZE": "2", "ZERO_HPZ_PARTITION_SIZE": "2"},
    "mics": {**SHARDED, "MICS_SHARD_SIZE": "2"},
    "hpz-tp2": {**SHARDED, "WORLD_SIZE": "8", "TP": "2", "ZERO_HPZ_PARTITION_SIZE": "2"},
    "mics-tp2": {**SHARDED, "WORLD_SIZE": "8", "TP": "2", "MICS_SHARD_SIZE": "2"},
    "offload1": {**OFFLOADED, "ZERO_STAGE": "1"},
    "offload2": {**OFFLOADED, "ZERO_STAGE": "2"},
    "offload3": {**OFFLOADED, "ZERO_STAGE": "3"},
    "hpz-offload": {**SHARDED, "ZERO_HPZ_PARTITION_SIZE": "2", "CPU_OPTIMIZER": "1"},
    "offload1-pp2": {**OFFLOADED, "ZERO_STAGE": "1", "PP": "2"},
}
CASES = [(layout, tied, gas) for layout in LAYOUTS for tied in "01" for gas in (1, 4)]
QUICK = [("hpz", "1", 4), ("mics", "0", 1), ("mics", "1", 4), ("offload1", "0", 4)]
QUICK += [("offload3", "1", 1), ("hpz-of-all", "0", 1)]


def build(variables: dict[str, str]) -> tuple[RunConfig, Engine]:
    """The run and its engine, on a rank."""
    config = front.run_config(variables)
    return config, front.build(config, large=True)


def train(variables: dict[str, str]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; what the tests run on every rank."""
    return front.train(variables, STEPS, large=True)


def settings(layout: str, tied: str, accumulation: int) -> dict[str, str]:
    """Variables of a run whose global batch is that of all others."""
    variables = {**COMMON, **LAYOUTS[layout], "TIE_EMBEDDINGS": tied}
    copies = int(variables["WORLD_SIZE"])
    for axis in ("TP", "PP"):
        copies //= int(variables.get(axis, "1"))
    micro_batch = 16 // copies // accumulation
    return variables | {"GRAD_ACC_STEPS": str(accumulation), "MICRO_BATCH": str(micro_batch)}


@cache
def one_process(tied: str) -> list[tuple[float, float]]:
    return run(train, 1, {**COMMON, "MICRO_BATCH": "16", "TIE_EMBEDDINGS": tied})[0]


def check(layout: str, tied: str, accumulation: int) -> None:
    variables = settings(layout, tied, accumulation)
    for curve in run(train, int(variables["WORLD_SIZE"]), variables, timeout=240):
        for (loss, norm), (wanted, wanted_norm) in zip(curve, one_process(tied), strict=True):
            assert loss == pytest.approx(wanted, abs=1e-5)
            assert norm == pytest.approx(wanted_norm, abs=1e-5)


def test_the_clip_binds() -> None:
    """Else a wrong norm would not be seen in the losses."""
    for tied in "01":
        assert min(norm for _, norm in one_process(tied)) > 0.3


@pytest.mark.parametrize(("layout", "tied", "accumulation"), QUICK)
def test_layout(layout: str, tied: str, accumulation: int) -> None:
    check(layout, tied, accumulation)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "tied", "accumulation"), [case for case in CASES if case not in QUICK]
)
def test_layout_long(layout: str, tied: str, accumulation: int) -> None:
    check(layout, tied, accumulation)


def half_precision(variables: dict[str, str]) -> list[tuple[float, float]]:
    return [pair for pair in train(variables) if pair[1] < float("inf")]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=LONG)])
def test_tied_weights_of_two_stages_with_the_optimizer_on_the_host(dtype: str) -> None:
    """Gradients that a pipeline adds up in fp32 are summed over both stages as well."""
    variables = settings("offload1-pp2", "1", 4) | {"DTYPE": dtype, "LR": "0.1"}
    plain = {**variables, "CPU_OPTIMIZER": "0"}
    curve, wanted = (run(half_precision, 2, given)[0] for given in (variables, plain))
    for pair, expected in zip(curve, wanted, strict=True):
        assert pair == pytest.approx(expected, abs=2e-3)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", ["hpz", "mics", "offload1", "offload2", "offload3"])
def test_half_precision(layout: str, dtype: str) -> None:
    """Against the same stage without the option; fp16's first steps overflow alike."""
    variables = settings(layout, "0", 4) | {"DTYPE": dtype, "LR": "0.1"}
    extra = ("ZERO_HPZ_PARTITION_SIZE", "MICS_SHARD_SIZE", "CPU_OPTIMIZER")
    plain = {name: value for name, value in variables.items() if name not in extra}
    ranks = int(variables["WORLD_SIZE"])
    wanted = run(half_precision, ranks, plain)[0]
    curve = run(half_precision, ranks, variables)[0]
    assert len(curve) == len(wanted)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(curve, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=2e-3)
        assert norm == pytest.approx(wanted_norm, abs=2e-3)


def neighbours(variables: dict[str, str]) -> list[tuple[int, ...]]:
    """Ranks of this one's MiCS shard and replica, or of its second partition."""
    _, engine = build(variables)
    if "MICS_SHARD_SIZE" in variables:
        groups = [engine._zero.dp_process_group, engine._replica.group]
    else:
        groups = [next(engine.module.parameters()).ds_zero_param_process_group]
    return [tuple(dist.get_process_group_ranks(group)) for group in groups]


@pytest.mark.parametrize("layout", ["mics-tp2", "hpz-tp2"])
def test_neighbours_share_out(layout: str) -> None:
    """Any two copies of the weights give the same losses: only near ones are fast.

    Four data-parallel ranks, every second rank of the world for TP is 2.
    """
    shards = {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3), 4: (4, 6), 5: (5, 7)}
    groups = run(neighbours, 8, settings(layout, "0", 1))
    assert {rank: groups[rank][0] for rank in shards} == shards
    if layout == "mics-tp2":
        assert [group[1] for group in groups] == [(rank % 4, rank % 4 + 4) for rank in range(8)]


# --- Partitioned initialisation -------------------------------------------------------------------


def train_unpartitioned(variables: dict[str, str]) -> list[tuple[float, float]]:
    """As `train`, with the whole model on every rank before it is shared out."""
    engine_package.partitioned_initialisation = lambda config, mpu: nullcontext()
    return train(variables)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=LONG)])
def test_partitioned_initialisation_changes_no_loss(dtype: str) -> None:
    variables = settings("zero3", "1", 1) | {"WORLD_SIZE": "2", "MICRO_BATCH": "8", "DTYPE": dtype}
    partitioned, whole = (run(fn, 2, variables)[0] for fn in (train, train_unpartitioned))
    for pair, wanted in zip(partitioned, whole, strict=True):
        assert pair == pytest.approx(wanted, abs=1e-6)


def held_bytes(parameters: list[nn.Parameter]) -> int:
    """Bytes of parameters, as they are and as they are shared out."""
    storages = {}
    for parameter in parameters:
        for kept in (parameter.data, vars(parameter).get("ds_tensor")):
            if kept is not None:
                storage = kept.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def watched(peaks: list[int]) -> Iterator[None]:
    """Notes at every draw the bytes held, those of the matrix being drawn included."""
    parameters: list[nn.Parameter] = []
    draw, mark = layers.sharded_normal_, layers.set_tensor_parallel_attributes

    def noting_draw(out, **arguments):
        peaks.append(held_bytes(parameters) + out.untyped_storage().nbytes())
        return draw(out, **arguments)

    def noting_mark(parameter, *arguments):
        parameters.append(parameter)
        return mark(parameter, *arguments)

    layers.sharded_normal_, layers.set_tensor_parallel_attributes = noting_draw, noting_mark
    try:
        yield
    finally:
        layers.sharded_normal_, layers.set_tensor_parallel_attributes = draw, mark


def peak_while_building(variables: dict[str, str]) -> tuple[int, int]:
    """(most bytes held while the model is built, bytes of its largest matrix)."""
    peaks: list[int] = []
    with watched(peaks):
        _, engine = build(variables)
    return max(peaks), max(4 * p.ds_numel for p in engine.module.parameters())


@pytest.mark.parametrize("world", [pytest.param(2, marks=LONG), 4])
def test_no_rank_ever_holds_the_whole_model(world: int) -> None:
    variables = {"NLAYERS": "12", "ZERO_STAGE": "3", "MICRO_BATCH": "1", "WORLD_SIZE": str(world)}
    whole = 4 * front.run_config(variables).parameters
    for peak, largest in run(peak_while_building, world, variables):
        assert whole / world <= peak + largest and peak <= 1.05 * whole / world + largest


# --- Bytes of states, from the tensors ------------------------------------------------------------


def state_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of fp32 weights and optimizer states, gradients, and weights that a rank keeps."""
    stage3 = "ds_id" in vars(next(engine.module.parameters()))
    flats = [p for group in engine.optimizer.param_groups for p in group["params"]]
    if stage3:
        flats = engine._zero.fp32_partitioned_groups_flat
    states = [
        value
        for flat in flats
        for value in engine.optimizer.state[flat].values()
        if value.shape == flat.shape
    ]
    kept = {"optimizer": sum(_bytes(t) for t in [*flats, *states])}
    if stage3:
        parameters = list(engine.module.parameters())
        seconds = [p.ds_secondary_tensor for p in parameters if p.ds_secondary_tensor is not None]
        kept["weights"] = sum(_bytes(t) for t in [*(p.ds_tensor for p in parameters), *seconds])
        kept["gradients"] = _bytes(engine._zero.grad_partitions_flat_buffer)
    else:
        kept["weights"] = sum(_bytes(p) for p in engine.module.parameters())
    return kept


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measured(variables: dict[str, str]) -> dict[str, int]:
    config, engine = build(variables)
    front.steps(config, engine, 0, 1)
    # Between forward and backward: then hpZ has its second partition too.
    kept: list[dict[str, int]] = []
    loss = engine._loss

    def noting_loss(logits, labels):
        kept.append(state_bytes(engine))
        return loss(logits, labels)

    engine._loss = noting_loss
    front.steps(config, engine, 1, 2)
    return kept[0]


MEASURED = {
    "zero1": {"WORLD_SIZE": "4", "ZERO_STAGE": "1"},
    "zero2": {"WORLD_SIZE": "4", "ZERO_STAGE": "2"},
    "zero3": SHARDED,
    "hpz": LAYOUTS["hpz"],
    "mics": LAYOUTS["mics"],
}


QUICKLY_MEASURED = ("zero1", "hpz", "mics")


@pytest.mark.parametrize(
    "layout", [x if x in QUICKLY_MEASURED else pytest.param(x, marks=LONG) for x in MEASURED]
)
def test_states_take_the_bytes_of_the_formula(layout: str) -> None:
    variables = {
        **MEASURED[layout],
        "NLAYERS": "2",
        "OPT": "adamw",
        "DTYPE": "bf16",
        "MICRO_BATCH": "1",
    }
    expected = memory_per_rank(front.run_config(variables))._asdict()
    for kept in run(measured, 4, variables):
        for part, size in kept.items():
            assert size == pytest.approx(expected[part], rel=0.05), part


# --- Checkpoints ----------------------------------------------------------------------------------


RESUMED = [
    "mics",
    "offload1",
    pytest.param("hpz", marks=LONG),
    pytest.param("offload3", marks=LONG),
]


@pytest.mark.parametrize("layout", RESUMED)
def test_resume_bit_for_bit(layout: str, tmp_path: Path) -> None:
    variables = settings(layout, "1", 1) | {"OPT": "adamw", "LR": "0.01"}
    ranks = int(variables["WORLD_SIZE"])
    whole = {**variables, "RUN_DIR": str(tmp_path / "whole")}
    expected, _ = run(front.train_and_save, ranks, whole, 4)[0]
    parts = {**variables, "RUN_DIR": str(tmp_path / "parts")}
    first, _ = run(front.train_and_save, ranks, parts, 2)[0]
    assert first + run(front.resume_and_train, ranks, parts, 2)[0] == expected


@pytest.mark.parametrize(
    ("before", "after"), [("mics", "offload1"), pytest.param("offload1", "mics", marks=LONG)]
)
def test_resume_in_another_layout(before: str, after: str, tmp_path: Path) -> None:
    common = {"OPT": "adamw", "LR": "0.01", "RUN_DIR": str(tmp_path / "one")}
    expected, _ = run(front.train_and_save, 1, {**COMMON, **common, "MICRO_BATCH": "16"}, 4)[0]
    common["RUN_DIR"] = str(tmp_path / "many")
    written, read = ({**settings(layout, "0", 1), **common} for layout in (before, after))
    run(front.train_and_save, int(written["WORLD_SIZE"]), written, 2)
    for curve in run(front.resume_and_train, int(read["WORLD_SIZE"]), read, 2):
        for (loss, norm), (wanted, wanted_norm) in zip(curve, expected[2:], strict=True):
            assert loss == pytest.approx(wanted, abs=1e-5)
            assert norm == pytest.approx(wanted_norm, abs=1e-5)


def test_one_replica_writes(tmp_path: Path) -> None:
    """What lies in a checkpoint does not grow with the number of replicas."""
    variables = settings("mics", "0", 1) | {"RUN_DIR": str(tmp_path)}
    run(front.train_and_save, 4, variables, 1)
    (checkpoint,) = store.committed(tmp_path / "checkpoints")
    sizes = sorted(path.stat().st_size for path in checkpoint.files("tensors"))
    weights = 4 * front.run_config(variables).parameters
    assert sum(sizes[:2]) < 1000 and sum(sizes[2:]) == pytest.approx(weights, rel=0.05)


# --- Optimizer on the host ------------------------------------------------------------------------


def test_no_compiler_is_needed(tmp_path: Path) -> None:
    """torch's own AdamW steps on the host: nothing is built."""
    variables = settings("offload1", "0", 1) | {"OPT": "adamw", "LR": "0.01"}
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "none"), "CXX": "/bin/false"}
    run(train, 2, variables, environ=environ)
    assert not (tmp_path / "none").exists()
