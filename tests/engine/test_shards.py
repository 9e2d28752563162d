"""What ranks own: every element of every parameter once, and what is loaded is what is owned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from megatron.parallel.piece import WEIGHT, Piece
from tests.equivalence import front
from tests.equivalence.case import Case
from tests.spawn import run

CASES = [
    Case(),
    Case(dp=2),
    Case(dp=2, zero_stage=2),
    Case(dp=3, zero_stage=3),
    Case(dp=2, dtype="bf16"),
    Case(dp=2, dtype="bf16", zero_stage=3),
    Case(tp=2, dp=2, tied=True),
    Case(tp=2, dp=2, zero_stage=3),
    Case(pp=2, tied=True, gas=2),
    Case(tp=2, pp=2, tied=True, gas=2),
    Case(sp=2, dp=2),
]


def variables(case: Case) -> dict[str, str]:
    """Of a run with AdamW; three ranks get samples too."""
    batch = {"GLOBAL_BATCH": "12", "MICRO_BATCH": "4"} if case.dp == 3 else {}
    return case.variables() | {"OPT": "adamw", "LR": "0.01"} | batch


@dataclass(frozen=True)
class Run:
    """Where a piece lies, without its values."""

    name: str
    shape: tuple[int, ...]
    partition_dim: int | None
    shard: int
    shards: int
    start: int
    length: int


def placed(piece: Piece) -> Run:
    length = piece.tensors[WEIGHT].numel()
    assert all(tensor.numel() == length for tensor in piece.tensors.values())
    where = piece.partition_dim, piece.shard, piece.shards, piece.start
    return Run(piece.name, piece.shape, *where, length)


Shapes = dict[str, tuple[int, ...]]


def owned(given: dict[str, str]) -> tuple[list[Run], list[Run], Shapes]:
    """Runs that a rank writes and that it reads, and the shapes of its module's parameters."""
    config = front.run_config(given)
    engine = front.build(config, large=True)
    front.steps(config, engine, 0, 1)
    shards = engine.shards()
    shapes = {name: tuple(p.shape) for name, p in engine.module.named_parameters()}
    return (
        [placed(piece) for piece in shards.pieces()],
        [placed(piece) for piece in shards.pieces(owned_only=False)],
        shapes,
    )


def covered(runs: list[Run], shape: tuple[int, ...]) -> Tensor:
    """How many of the runs hold each element of a whole parameter."""
    count = torch.zeros(shape, dtype=torch.int64)
    for one in runs:
        assert one.shape == shape
        dim = 0 if one.partition_dim is None else one.partition_dim
        shard = count.chunk(one.shards, dim=dim)[one.shard]
        flat = shard.flatten().clone()
        assert one.start + one.length <= flat.numel(), one
        flat[one.start : one.start + one.length] += 1
        shard.copy_(flat.view(shard.shape))
    return count


def by_name(runs: list[Run]) -> dict[str, list[Run]]:
    return {name: [r for r in runs if r.name == name] for name in {r.name for r in runs}}


@cache
def ranks_of(case: Case, mics: str = "0") -> list[tuple[list[Run], list[Run], Shapes]]:
    """What each rank of a layout owns."""
    return run(owned, case.world, variables(case) | {"MICS_SHARD_SIZE": mics})


@pytest.mark.parametrize(
    ("case", "mics"), [*((case, "0") for case in CASES), (Case(dp=4, zero_stage=3), "2")], ids=str
)
def test_every_element_has_one_owner(case: Case, mics: str) -> None:
    ranks = ranks_of(case, mics)
    written = by_name([r for rank in ranks for r in rank[0]])
    _, _, shapes = ranks_of(Case(tied=case.tied))[0]
    assert written.keys() == shapes.keys()
    for name, runs in written.items():
        assert torch.equal(covered(runs, shapes[name]), torch.ones(shapes[name]).long()), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ranks_that_hold_a_stage_read_all_of_it(case: Case) -> None:
    """TP ranks and tied stages each read their own; together a parameter as often as it is held."""
    for name, runs in by_name([r for rank in ranks_of(case) for r in rank[1]]).items():
        count = covered(runs, runs[0].shape)
        assert count.min() == count.max() >= 1, name


# --- Load -----------------------------------------------------------------------------------------


def values(piece: Piece, state: str) -> Tensor:
    """What a test's checkpoint has for a run: a pure function of name, state and place."""
    seed = sum(map(ord, piece.name + state)) + 1000 * piece.shard
    whole = torch.rand(200_000, generator=torch.Generator().manual_seed(seed))
    return whole[piece.start : piece.start + piece.tensors[WEIGHT].numel()]


def loaded(given: dict[str, str], load_optimizer: bool) -> list[str]:
    """Loads, and names what the pieces after it, and the model's weights, have wrong."""
    config = front.run_config(given)
    engine = front.build(config, large=True)
    front.steps(config, engine, 0, 1)
    before = {p.name: p.tensors["exp_avg"].clone() for p in engine.shards().pieces(False)}

    def read(piece: Piece) -> tuple[dict[str, Tensor], dict[str, float]]:
        states = (WEIGHT, "exp_avg", "exp_avg_sq")
        return {state: values(piece, state) for state in states}, {"step": 7.0}

    engine.shards().load(read, load_optimizer)
    wrong = []
    for piece in engine.shards().pieces(owned_only=False):
        if not torch.equal(piece.tensors[WEIGHT], values(piece, WEIGHT)):
            wrong.append(f"{piece.name} weight")
        average = values(piece, "exp_avg") if load_optimizer else before[piece.name]
        if not torch.equal(piece.tensors["exp_avg"], average):
            wrong.append(f"{piece.name} average")
        if piece.scalars["step"] != (7.0 if load_optimizer else 1.0):
            wrong.append(f"{piece.name} step {piece.scalars['step']}")
    for span in engine.shards().spans():
        parameter = span.parameter
        if parameter.numel():  # ZeRO-3 has emptied it
            own = parameter.detach().flatten()[span.start : span.start + span.length]
            if not torch.equal(own, span.view(span.flat.detach()).to(own.dtype)):
                wrong.append(f"the model's weight at {span.start}")
    return wrong


@pytest.mark.parametrize("load_optimizer", [True, False])
@pytest.mark.parametrize("case", [CASES[0], *CASES[2:6], CASES[9]], ids=str)
def test_what_is_loaded_is_owned(case: Case, load_optimizer: bool) -> None:
    for wrong in run(loaded, case.world, variables(case), load_optimizer):
        assert wrong == []
