"""The sharded engine: where it runs, what it overlaps and frees, and checkpoints that it shares."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.engine import buckets
from megatron.engine.buckets import Bucket, buckets_of
from megatron.engine.gathering import Gathering
from megatron.engine.reduction import Reduction, in_backward_order
from megatron.engine.sharded import ShardedEngine
from megatron.model.layer import Layer
from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.piece import WEIGHT
from tests.equivalence import front
from tests.equivalence.case import Case
from tests.spawn import run

ADAM = {"OPT": "adamw", "LR": "0.01"}


# --- Where it runs --------------------------------------------------------------------------------


def configured(**variables: str) -> RunConfig:
    return front.run_config({"WORLD_SIZE": "4", **variables})


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"PP": "2"}, "PP=2"),
        ({"ZERO_STAGE": "3"}, "ZERO_STAGE=3"),
        ({"CPU_OPTIMIZER": "1"}, "CPU_OPTIMIZER=1"),
        ({"DTYPE": "fp16"}, "DTYPE=fp16"),
    ],
)
def test_deepspeed_takes_the_steps_that_it_cannot(variables: dict[str, str], named: str) -> None:
    assert configured(**variables).sharded is None
    with pytest.raises(ConfigError, match=f"ENGINE=sharded does not run with {named}: .*Unset"):
        configured(**variables, ENGINE="sharded")


@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_it_is_the_default_elsewhere(stage: str) -> None:
    settings = configured(ZERO_STAGE=stage, TP="2", GRAD_ACC_STEPS="3", GLOBAL_BATCH="").sharded
    assert settings is not None and settings.reduces_each == (stage == "2")
    assert settings.accumulation_steps == 3 and settings.clip_grad == 0.3
    assert configured(ZERO_STAGE=stage, ENGINE="deepspeed").sharded is None


# --- Buckets --------------------------------------------------------------------------------------


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def axis(size: int, rank: int) -> Axis:
    """An axis without communication, to look at one rank's slice."""
    group: Any = None if size == 1 else object()
    return Axis(group=group, rank=rank, size=size, ranks=tuple(range(size)))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_element_lies_in_one_slice(size: int) -> None:
    shapes = [(3, 5), (64,), (1,), (33, 9)]
    whole = {number: p.clone() for number, p in enumerate(parameters(*shapes))}
    seen = {number: torch.zeros(p.numel()) for number, p in whole.items()}
    for rank in range(size):
        own = parameters(*shapes)
        for bucket in buckets_of(own, axis(size, rank)):
            for span in bucket.spans():
                number = next(n for n, p in enumerate(own) if p is span.parameter)
                run_of = slice(span.start, span.start + span.length)
                assert torch.equal(span.view(span.flat), whole[number].flatten()[run_of].float())
                seen[number][run_of] += 1
    assert all(bool((count == 1).all()) for count in seen.values())


def test_buckets_are_cut_by_size_kind_and_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "LARGEST", 100)
    made = parameters((50,), (50,), (50,), (200,), (10,), (10,), (10,))
    made[4].tensor_model_parallel = True  # type: ignore[attr-defined]
    made[5].is_vocabulary = True  # type: ignore[attr-defined]
    sizes = [[p.numel() for p in b.parameters] for b in buckets_of(made, axis(2, 0))]
    assert sizes == [[50, 50], [50], [200], [10], [10], [10]]


def test_what_no_micro_batch_reached_is_zero() -> None:
    """A buffer is not cleared before it is filled."""
    (bucket,) = buckets_of(parameters((3,), (5,), (70,)), axis(2, 0))
    for _ in range(2):
        bucket.add(1, torch.full((5,), 2.0), torch.float32)
        taken = bucket.take(torch.bfloat16)
        assert taken.dtype == torch.bfloat16 and taken.sum() == 10.0
        assert torch.equal(taken[64:69], torch.full((5,), 2.0).bfloat16())
    assert bucket.take(torch.float32).abs().sum() == 0


def test_one_rank_in_fp32_trains_the_parameters_themselves() -> None:
    """No copy of weights or gradients, no hook."""
    own = parameters((4, 4), (4,), dtype=torch.float32)
    made = in_backward_order(buckets_of(own, SERIAL), own)
    reduction = Reduction(made, SERIAL, torch.float32, each=False)
    (own[0] * own[0]).sum().backward()
    gradient = own[0].grad
    assert gradient is not None
    reduction.begin(0, 1)
    reduction.end()
    assert made[1].master.data_ptr() == own[0].data_ptr()
    assert made[1].master.grad is not None and own[0].grad is None
    assert made[1].master.grad.data_ptr() == gradient.data_ptr()
    assert made[0].master.grad is not None and made[0].master.grad.abs().sum() == 0


# --- What a backward pass does --------------------------------------------------------------------


def overlapped(variables: dict[str, str]) -> dict[str, Any]:
    """In the last micro-batch: gradients that had not come when each reduction began, and so on."""
    config = front.run_config(variables)
    engine = front.build(config)
    assert isinstance(engine, ShardedEngine)
    front.steps(config, engine, 0, 1)
    missing, kept = set[int](), list[int]()
    for parameter in engine.module.parameters():
        parameter.register_hook(lambda _, key=parameter: missing.discard(id(key)))
    began: list[int] = []
    launch, take = Reduction._launch, Bucket.take

    def noted(self: Reduction) -> None:
        began.append(len(missing))
        launch(self)

    def counted(self: Bucket, dtype: torch.dtype) -> Tensor:
        kept.append(sum(b._buffer is not None for b in engine._buckets))
        return take(self, dtype)

    Reduction._launch, Bucket.take = noted, counted  # type: ignore[method-assign]
    begin = engine._reduction.begin

    def begun(number: int, of: int) -> None:
        missing.update(id(p) for p in engine.module.parameters())
        begin(number, of)

    engine._reduction.begin = begun  # type: ignore[method-assign]
    front.steps(config, engine, 1, 2)
    grads = [p.grad for p in engine.module.parameters()]
    return {"began": began, "kept": kept, "freed": all(g is None for g in grads)}


@pytest.mark.parametrize("stage", [1, 2])
def test_reductions_begin_before_the_last_gradient_exists(stage: int) -> None:
    variables = Case(dp=2, zero_stage=stage, gas=2).variables()
    for found in run(overlapped, 2, variables):
        assert found["began"][0] > 30  # of the 39 gradients: only the head's had come
        assert found["began"][-1] == 0 and found["freed"]
        reductions = 4 if stage == 1 else 8  # head, matrices, norms, embedding
        assert len(found["began"]) == reductions


def test_with_one_micro_batch_buckets_live_until_they_are_reduced() -> None:
    for found in run(overlapped, 2, Case(dp=2).variables()):
        assert found["kept"][0] == 1  # the others have no buffer yet
        assert max(found["kept"]) < 4


class Slow:
    """A collective that is under way until it is waited for."""

    done = False

    def wait(self) -> None:
        self.done = True


def test_a_layer_waits_for_its_own_weights_before_it_computes() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    works = {name: Slow() for name in ("first", "second")}
    gathering = Gathering()
    for module, work in zip((first, second), works.values(), strict=True):
        gathering._works |= {id(parameter): work for parameter in module.parameters()}

    def compute(module: nn.Module, x: Tensor) -> Tensor:
        assert works["first"].done and not works["second"].done
        return x

    layer = gathering.waiting(Layer("one", nn.Linear, lambda: first, forward=compute))
    assert layer.forward is not None
    layer.forward(first, torch.zeros(2))
    gathering.finish()
    assert works["second"].done and gathering._works == {}


def late(variables: dict[str, str]) -> float:
    """Loss of a second step where weights come as late as they may."""
    works: list[Slow] = []
    gather = Bucket.gather

    class Late(Slow):
        def __init__(self, bucket: Bucket) -> None:
            self.bucket = bucket

        def wait(self) -> None:
            if not self.done:
                work = gather(self.bucket)
                assert work is not None
                work.wait()
            self.done = True

    def begun(self: Bucket) -> Any:
        works.append(Late(self))
        return works[-1]

    Bucket.gather = begun  # type: ignore[method-assign, assignment]
    config = front.run_config(variables)
    return front.steps(config, front.build(config), 0, 3)[-1][0]


def test_no_weight_is_read_before_it_has_come() -> None:
    variables = Case(dp=2, dtype="bf16", tied=True).variables()
    expected = run(front.train, 2, variables, 3)[0][-1][0]
    assert run(late, 2, variables) == [expected] * 2


# --- Clipping, and a parameter whose gradient is a part of a sum ----------------------------------


def partial_gradients(variables: dict[str, str], marked: bool) -> tuple[float, float]:
    """Norm of a step whose replicated gradients differ over TP, and the spread of the weights."""
    config = front.run_config(variables)
    start = ShardedEngine.__init__

    def init(self: ShardedEngine, module: nn.Module, *args: Any) -> None:
        for parameter in module.parameters():
            if not hasattr(parameter, "partition_dim") and marked:
                parameter.tp_partial_grad = True  # type: ignore[attr-defined]
            if not hasattr(parameter, "partition_dim"):
                share = 0.25 if dist.get_rank() == 0 else 0.75
                parameter.register_hook(lambda gradient, share=share: gradient * share)
        start(self, module, *args)

    ShardedEngine.__init__ = init  # type: ignore[method-assign]
    engine = front.build(config)
    ((_, norm),) = front.steps(config, engine, 0, 1)
    spread = 0.0
    for parameter in engine.module.parameters():
        if not hasattr(parameter, "partition_dim"):
            largest, least = parameter.detach().clone(), parameter.detach().clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            spread = max(spread, float((largest - least).abs().max()))
    return norm, spread


def test_partial_gradients_are_summed_over_tensor_parallel_ranks_before_the_norm() -> None:
    variables = Case(tp=2).variables()
    ((_, expected),) = run(front.train, 2, variables, 1)[0]
    for norm, spread in run(partial_gradients, 2, variables, True):
        assert norm == pytest.approx(expected, rel=1e-6) and spread == 0.0
    assert run(partial_gradients, 2, variables, False)[0][1] > 0.0  # the test has teeth


# --- The step of an accelerator, which does not wait ----------------------------------------------


def unwaited(variables: dict[str, str], waits: bool, poisoned: int) -> list[Any]:
    """Curve, what was applied, and the weights, with one step whose gradient is not finite."""
    config = front.run_config(variables)
    engine = front.build(config)
    assert isinstance(engine, ShardedEngine) and engine._waits
    engine._waits = waits
    weight = next(p for p in engine.module.parameters() if hasattr(p, "partition_dim"))
    applied, curve = [], []
    for step in range(4):
        handle = weight.register_hook(lambda g, at=step: g * math.nan if at == poisoned else g)
        curve += front.steps(config, engine, step, step + 1)
        handle.remove()
        applied.append(engine.step_applied)
    pieces = engine.shards().pieces()
    numbers = [piece.scalars for piece in pieces]
    return [curve, applied, [piece.tensors[WEIGHT].clone() for piece in pieces], numbers]


@pytest.mark.parametrize("rule", [ADAM, {"OPT": "sgd"}])
def test_a_fused_rule_clips_and_skips_on_the_device(rule: dict[str, str]) -> None:
    variables = Case(dp=2).variables() | rule
    for waits, not_waiting in zip(
        *(run(unwaited, 2, variables, waits, 2) for waits in (True, False)), strict=True
    ):
        assert not_waiting[1] == waits[1] == [True, True, False, True]
        assert not_waiting[3] == waits[3]
        for (loss, _), (expected, _) in zip(not_waiting[0], waits[0], strict=True):
            assert math.isnan(loss) == math.isnan(expected)
            assert math.isnan(loss) or loss == pytest.approx(expected, abs=1e-4)
        for weight, expected in zip(not_waiting[2], waits[2], strict=True):
            torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["sharded", "deepspeed"])
@pytest.mark.parametrize(
    "case",
    [
        Case(dp=2),
        pytest.param(Case(tp=2, dp=2, dtype="bf16"), marks=pytest.mark.long),
        pytest.param(Case(dp=2, zero_stage=2, tied=True), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_under_the_other_engine(
    case: Case, first: str, tmp_path: Path
) -> None:
    """Weights and moments are the same numbers; a first step after them has the same loss."""
    other = {"sharded": "deepspeed", "deepspeed": "sharded"}[first]
    folder = {"RUN_DIR": str(tmp_path)}
    written = case.variables() | ADAM | folder
    run(front.train_and_save, case.world, written | {"ENGINE": first}, 2)
    curves = [
        run(front.resume_and_train, case.world, written | {"ENGINE": engine}, 3)[0]
        for engine in (first, other)
    ]
    for (loss, norm), (other_loss, other_norm) in zip(*curves, strict=True):
        assert other_loss == pytest.approx(loss, abs=1e-5 if case.dtype == "fp32" else 2e-3)
        assert other_norm == pytest.approx(norm, abs=1e-5 if case.dtype == "fp32" else 5e-3)
    assert curves[0][0][0] == pytest.approx(curves[1][0][0], rel=2e-7)  # an ulp of fp32
