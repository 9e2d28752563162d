"""A small model, trained under DeepSpeed in a layout and by a plain loop on whole matrices."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.layout import Layout
from megatron.config.schema import OptimizerConfig
from megatron.engine import start_distributed, start_engine
from megatron.engine.distributed import ModelParallelUnit
from megatron.engine.zero import ZeroEngine
from megatron.parallel.groups import SERIAL, Axis, Groups, make_groups
from megatron.parallel.head_loss import Targets, TargetsOf, head_loss
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_parallel_attributes,
)
from megatron.training.optimizers.rules import make_optimizer
from megatron.training.optimizers.schedule_free import evaluation_weights
from megatron.training.optimizers.sophia import (
    SophiaG,
    hessian_step,
    label_draws,
    with_sampled_labels,
)
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer

for _library in ("pytorch_optimizer", "schedulefree"):
    with contextlib.suppress(ImportError):  # once here, not again in every forked rank
        importlib.import_module(_library)

Weights = dict[str, Tensor]
Pieces = dict[str, tuple[Weights, dict[str, float]]]  # name -> this rank's 1-D tensors, numbers
Plain = Callable[[list[tuple[str, nn.Parameter]], OptimizerConfig], list[torch.optim.Optimizer]]

VOCAB, HIDDEN, INNER = 11, 6, 10
BATCH, LENGTH, STEPS = 8, 5, 5
CLIP = 0.1  # always binding: the tests look at the norm
HESSIAN_EVERY = 2
RATES = {"sgd": 0.5, "muon": 1e-3}
LAYOUTS = {"one": (1, 1), "dp2": (1, 2), "tp2": (2, 1), "tp2dp2": (2, 2)}  # name -> (TP, DP)


class _MLP(nn.Module):
    def __init__(self, tp: Axis) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(HIDDEN, INNER, tp, seed=1, name="1.mlp.up", std=0.4)
        self.down = RowParallelLinear(INNER, HIDDEN, tp, seed=1, name="1.mlp.down", std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class _Block(nn.Module):
    def __init__(self, tp: Axis) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN))
        set_tensor_parallel_attributes(self.norm, (HIDDEN,), None)
        self.mlp = _MLP(tp)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x * self.norm)


class _Model(nn.Sequential):
    targets: TargetsOf = Targets

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding, block, head = self
        hidden = block(embedding(tokens))
        if labels is None:
            return head(hidden)
        return head_loss(hidden, head.weight, self.targets(labels), head.tp, VOCAB)


def build(tp: Axis, padded_vocab: int, weights: Mapping[str, Tensor] | None = None) -> _Model:
    """Embedding, one block, head; names as in the real model. `weights` are whole and unpadded."""
    model = _Model(
        VocabParallelEmbedding(VOCAB, padded_vocab, HIDDEN, tp, seed=1, name="0", std=0.4),
        _Block(tp),
        ColumnParallelLinear(HIDDEN, padded_vocab, tp, seed=1, name="2", std=0.4, used_rows=VOCAB),
    )
    for name, parameter in model.named_parameters():
        if weights is not None:
            parameter.data.copy_(_shard_of(weights[name], parameter, tp))
    return model


def _shard_of(unpadded: Tensor, parameter: nn.Parameter, tp: Axis) -> Tensor:
    """This rank's part of a whole value for `parameter`."""
    padded = torch.zeros(parameter.full_shape)
    padded[: unpadded.shape[0]] = unpadded
    if not getattr(parameter, "tensor_model_parallel", False):
        return padded
    return padded.chunk(tp.size, dim=parameter.partition_dim)[tp.rank]


def newton_schulz_in_fp32() -> AbstractContextManager[Any]:
    """Inside it torch's Muon iterates in fp32.

    In bf16 gradients that differ between layouts in their last fp32 bit can round to different
    numbers, 2^-8 apart: no statement of 1e-6 could be made.
    """
    return patch.object(torch.Tensor, "bfloat16", torch.Tensor.float)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels (B, S) of a step."""
    generator = torch.Generator().manual_seed(step)
    data = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    return data[:, :-1], data[:, 1:]


def given_gradients(step: int) -> Weights:
    """Whole gradients that no arithmetic has touched, for a comparison that bf16 would blur."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in build(SERIAL, VOCAB).named_parameters()
    }


def draws(step: int) -> Tensor:
    """What a step's labels are drawn by, (B, S)."""
    return label_draws(7, step, [step * BATCH + i for i in range(BATCH)], LENGTH)


def settings(name: str) -> OptimizerConfig:
    return dataclasses.replace(
        OptimizerConfig(),
        optimizer=name,
        learning_rate=RATES.get(name, 1e-2),
        sgd_momentum=0.9,
        muon_momentum=0.8,
        sophia_beta1=0.8,
        sophia_beta2=0.7,
    )


@dataclass(frozen=True)
class Case:
    """One run under DeepSpeed.

    Attributes:
        name: update rule.
        tp, dp: layout; the world has tp x dp ranks.
        zero: ZeRO stage.
        dtype: fp32 or bf16.
        first, last: steps taken, inclusive, from 1.
        flat: use the plain rule on the flat partitions, as a negative control.
        evaluate: go to the evaluation weights and back after every step.
        given: put `given_gradients` in the place of the computed ones (BF16_Optimizer only).
    """

    name: str
    tp: int = 1
    dp: int = 1
    zero: int = 1
    dtype: str = "fp32"
    first: int = 1
    last: int = STEPS
    flat: Plain | None = None
    evaluate: bool = False
    given: bool = False


@dataclass(frozen=True)
class Result:
    """What one rank holds at the end.

    Attributes:
        shards: its shards of the fp32 weights.
        evaluated: model's weights inside `evaluation_weights`, after the last step.
        state: its part of the optimizer's whole states.
        pieces: its runs of the flat partitions, as a checkpoint takes them.
        counters: of the optimizer.
        kind: class of DeepSpeed's optimizer.
    """

    shards: Weights
    evaluated: Weights
    state: dict[str, dict[str, Any]]
    pieces: Pieces
    counters: dict[str, float]
    kind: str


def _deepspeed_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // case.dp,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": case.zero},
        "zero_allow_untested_optimizer": True,
    }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        if case.zero == 1:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def trained(
    cases: list[Case],
    weights: Mapping[str, Tensor] | None = None,
    states: Mapping[str, Mapping[str, Any]] | None = None,
    pieces: list[Pieces] | None = None,
    numbers: Mapping[str, float] | None = None,
) -> list[Result]:
    """Runs the cases, all of one layout, one after another; called on every rank.

    Args:
        cases: what to run.
        weights: whole weights to start from.
        states: whole states to start from.
        pieces: weights and flat states of each rank, for the layout they come from.
        numbers: counters to start from.
    """
    gc.freeze()  # DeepSpeed's bf16 optimizer collects garbage a dozen times in its constructor
    rank = dist.get_rank()
    start_distributed("gloo", rank, dist.get_world_size(), 0, "", 60)
    groups = make_groups(Layout(tp=cases[0].tp, pp=1, dp=cases[0].dp))
    mpu = ModelParallelUnit(groups.tp, groups.dp)
    start = _Start(weights, states, None if pieces is None else pieces[groups.rank], numbers)
    with newton_schulz_in_fp32():
        return [_train(case, groups, mpu, start) for case in cases]


@dataclass(frozen=True)
class _Start:
    weights: Mapping[str, Tensor] | None
    states: Mapping[str, Mapping[str, Any]] | None
    pieces: Pieces | None
    numbers: Mapping[str, float] | None


def _train(case: Case, groups: Groups, mpu: ModelParallelUnit, start: _Start) -> Result:
    tp, dp = groups.tp, groups.dp
    model = build(tp, padded_vocab=12 if tp.size == 1 else 16, weights=start.weights)

    def optimizer_of(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        if case.flat is None:
            return make_optimizer(settings(case.name), named)
        (flat,) = case.flat(list(named), settings(case.name))
        return flat

    model.targets = with_sampled_labels(Targets, tp, VOCAB)
    engine = start_engine(
        ZeroEngine,
        model,
        optimizer_of,
        groups,
        torch.device("cpu"),
        _deepspeed_config(case),
        mpu,
    )
    optimizer, shards = engine.optimizer, engine.shards()
    if isinstance(optimizer, WholeMatrixOptimizer):
        optimizer.bind(model.named_parameters(), dp, tp, shards.spans(), VOCAB)
        if start.states is not None:
            optimizer.load_whole_state(start.states)
    if start.pieces is not None:
        pieces = start.pieces
        shards.load(lambda piece: pieces[piece.name])
    shards.load_counters(start.numbers or {})

    def step(tokens: Tensor, labels: Tensor, gradients: Weights) -> None:
        mine = slice(dp.rank * BATCH // dp.size, (dp.rank + 1) * BATCH // dp.size)
        with _given(engine, gradients, tp) if case.given else contextlib.nullcontext():
            engine.train_batch([(tokens[mine], labels[mine])])

    evaluated: Weights = {}
    for number in range(case.first, case.last + 1):
        tokens, labels = batch(number)
        if isinstance(optimizer, SophiaG) and number % HESSIAN_EVERY == 1:
            with engine.unclipped(), hessian_step(optimizer, BATCH * LENGTH):
                step(tokens, draws(number), given_gradients(100 + number))
        step(tokens, labels, given_gradients(number))
        if case.evaluate:
            with evaluation_weights(optimizer, engine.refresh_weights):
                evaluated = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    whole = optimizer.whole_state() if isinstance(optimizer, WholeMatrixOptimizer) else {}
    pieces_now = {
        piece.name: ({k: v.clone() for k, v in piece.tensors.items()}, dict(piece.scalars))
        for piece in shards.pieces(owned_only=False)
    }
    kind = type(engine._zero).__name__
    result = Result(_shards(model), evaluated, whole, pieces_now, shards.counters(), kind)
    engine.close()
    return result


def _given(engine: ZeroEngine, gradients: Weights, tp: Axis) -> AbstractContextManager[Any]:
    """Inside, a step takes these: after the reduction over data-parallel ranks, before clipping."""
    zero, step = engine._zero, engine._deepspeed.step

    def given_step() -> None:
        for members, buffers in zip(zero.bf16_groups, zero.fp32_groups_gradients, strict=True):
            for parameter, buffer in zip(members, buffers, strict=True):
                gradient = gradients[zero.param_names[parameter]]
                buffer.copy_(_shard_of(gradient, parameter, tp).reshape(-1))
        step()

    return patch.object(engine._deepspeed, "step", given_step)


def _shards(model: nn.Module) -> Weights:
    return {
        name: deepspeed.utils.safe_get_full_fp32_param(p).detach().clone()
        for name, p in model.named_parameters()
    }


def whole(shards: list[Weights], tp: int) -> Weights:
    """Whole weights from the shards of ranks 0 .. world - 1, the vocabulary's padding cut off."""
    cut = {"0.weight": 0, "1.mlp.up.weight": 0, "1.mlp.down.weight": 1, "2.weight": 0}
    result = {}
    for name in shards[0]:
        if name in cut:
            result[name] = torch.cat([part[name] for part in shards[:tp]], dim=cut[name])
        else:
            result[name] = shards[0][name]
        if name in ("0.weight", "2.weight"):
            assert not result[name][VOCAB:].any(), f"{name}: padding was trained"
            result[name] = result[name][:VOCAB]
    return result


def plain_loop(
    name: str,
    rule: Plain,
    last: int = STEPS,
    evaluate: bool = False,
    given: bool = False,
) -> tuple[Weights, list[float]]:
    """The rule on whole matrices in one process without DeepSpeed.

    With `given` from weights rounded to bf16, on `given_gradients`.

    Returns:
        Weights after the last step (with `evaluate` those to evaluate), gradient norm of each step.
    """
    model = build(SERIAL, VOCAB)
    if given:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    optimizers = rule(list(model.named_parameters()), settings(name))

    def backward(number: int, drawn: bool) -> None:
        model.zero_grad()
        tokens, labels = batch(number)
        logits = model(tokens)
        if drawn:
            cumulative = logits.detach().double().softmax(-1).cumsum(-1)
            labels = torch.searchsorted(cumulative, draws(number).unsqueeze(-1), right=True)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        if given:
            for key, gradient in given_gradients(number + 100 * drawn).items():
                model.get_parameter(key).grad = gradient

    norms = []
    for number in range(1, last + 1):
        if name == "sophiag" and number % HESSIAN_EVERY == 1:
            backward(number, drawn=True)
            for optimizer in optimizers:
                optimizer.estimate(BATCH * LENGTH)  # type: ignore[attr-defined]
        backward(number, drawn=False)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        with newton_schulz_in_fp32():
            for optimizer in optimizers:
                optimizer.step()
    if evaluate:
        for optimizer in optimizers:
            optimizer.eval()  # type: ignore[attr-defined]
    return {n: p.detach().clone() for n, p in model.named_parameters()}, norms
