"""Every update rule gives the weights of one process under ZeRO and tensor parallelism."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config.schema import OptimizerConfig
from megatron.config.update_rules import RULES
from megatron.parallel.groups import SERIAL
from megatron.training.optimizers import rules as table
from megatron.training.optimizers.parameter_groups import decay_text, parameter_groups
from megatron.training.optimizers.schedule_free import evaluation_weight
from tests.spawn import RankError, run
from tests.training.optimizers.cases import (
    CLIP,
    LAYOUTS,
    VOCAB,
    Case,
    Result,
    Weights,
    build,
    plain_loop,
    settings,
    trained,
    whole,
)

OPTIONAL = {"lamb": "pytorch_optimizer", "adamwschedulefree": "schedulefree"}
WHOLE_MATRIX = ("muon", "adafactor", "lamb")
NAMES = tuple(table.OPTIMIZERS)


def _installed(name: str) -> bool:
    return name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name]) is not None


def _needs(name: str) -> None:
    if not _installed(name):
        pytest.skip(f"{name} needs {OPTIONAL[name]}")


Named = list[tuple[str, nn.Parameter]]


def _groups(named: Named, s: OptimizerConfig) -> list[dict[str, Any]]:
    """Decayed matrices and undecayed vectors."""
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": s.weight_decay},
        {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]


def plain(named: Named, s: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The rule from its library, on whole matrices, independent of the project's table."""
    groups = _groups(named, s)
    betas = (s.adam_beta1, s.adam_beta2)
    lr = s.learning_rate
    if s.optimizer == "adamw":
        return [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=s.adam_eps)]
    if s.optimizer == "adam":
        return [torch.optim.Adam(groups, lr=lr, betas=betas, eps=s.adam_eps)]
    if s.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=lr, momentum=s.sgd_momentum)]
    if s.optimizer == "adafactor":
        return [torch.optim.Adafactor(groups, lr=lr)]
    if s.optimizer == "muon":
        hidden = [p for n, p in named if ".mlp." in n]
        rest = [(n, p) for n, p in named if ".mlp." not in n]
        muon = torch.optim.Muon(
            hidden,
            lr=lr,
            weight_decay=s.weight_decay,
            momentum=s.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        return [muon, torch.optim.AdamW(_groups(rest, s), lr=lr, betas=betas, eps=s.adam_eps)]
    if s.optimizer == "lamb":
        from pytorch_optimizer import Lamb

        return [Lamb(groups, lr=lr, betas=betas, eps=s.adam_eps, weight_decouple=False)]
    if s.optimizer == "adamwschedulefree":
        from schedulefree import AdamWScheduleFree

        rule = AdamWScheduleFree(groups, lr=lr, betas=betas, eps=s.adam_eps)
        rule.train()
        return [rule]
    assert s.optimizer == "sophiag"
    return [_PlainSophia(groups, s)]


class _PlainSophia(torch.optim.Optimizer):
    """Algorithm 3 of the paper, written down parameter by parameter."""

    def __init__(self, groups: list[dict[str, Any]], s: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": s.learning_rate})
        self._s = s
        self._m: dict[Tensor, Tensor] = {}
        self._h: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def estimate(self, tokens: int) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                new = tokens * p.grad * p.grad
                old = self._h.get(p, torch.zeros_like(p))
                self._h[p] = self._s.sophia_beta2 * old + (1 - self._s.sophia_beta2) * new

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                old = self._m.get(p, torch.zeros_like(p))
                self._m[p] = self._s.sophia_beta1 * old + (1 - self._s.sophia_beta1) * p.grad
                ratio = self._m[p] / (self._s.sophia_rho * self._h[p]).clamp(min=1e-15)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * ratio.clamp(-1, 1))


@functools.cache
def _expected(name: str) -> Weights:
    weights, norms = plain_loop(name, plain)
    assert min(norms) > CLIP, f"clipping does not bind: {norms}"
    return weights


@functools.cache
def _results(layout: str) -> dict[str, Weights]:
    tp, dp = LAYOUTS[layout]
    cases = [Case(name, tp, dp) for name in NAMES if _installed(name)]
    ranks = run(trained, tp * dp, cases)
    return {
        case.name: whole([rank[i].shards for rank in ranks], tp) for i, case in enumerate(cases)
    }


def _start() -> Weights:
    return {n: p.detach() for n, p in build(SERIAL, VOCAB).named_parameters()}


def _difference(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_table_has_the_names_that_the_configuration_accepts() -> None:
    assert set(NAMES) == set(RULES)
    assert set(WHOLE_MATRIX) == {name for name, rule in RULES.items() if rule.whole_matrix}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(name: str, layout: str) -> None:
    _needs(name)
    assert _difference(_expected(name), _start()) > 1e-3
    assert _difference(_results(layout)[name], _expected(name)) < 1e-6


@pytest.mark.parametrize("zero", [2, 3])
def test_elementwise_rules_under_higher_stages(zero: int) -> None:
    names = ["adamw", "sgd", "sophiag"]
    if zero == 2 and _installed("adamwschedulefree"):
        names.append("adamwschedulefree")
    ranks = run(trained, 2, [Case(name, dp=2, zero=zero) for name in names])
    for i, name in enumerate(names):
        assert _difference(whole([r[i].shards for r in ranks], 1), _expected(name)) < 1e-6, name


@pytest.mark.parametrize("name", WHOLE_MATRIX)
def test_the_plain_rule_on_flat_partitions_is_wrong(name: str) -> None:
    """Negative control: without WholeMatrixOptimizer the comparison above does not hold."""
    _needs(name)
    case = Case(name, dp=2, flat=_muon_alone if name == "muon" else plain)
    if name == "muon":
        with pytest.raises(RankError, match="2D matrix"):
            run(trained, 2, [case])
        return
    ranks = run(trained, 2, [case])
    assert _difference(whole([r[0].shards for r in ranks], 1), _expected(name)) > 1e-4


def _muon_alone(named: Named, s: OptimizerConfig) -> list[torch.optim.Optimizer]:
    return [torch.optim.Muon([p for n, p in named if ".mlp." in n], lr=s.learning_rate)]


@pytest.mark.parametrize("name", ["adafactor", "lamb"])
@pytest.mark.parametrize(("layout", "other"), [("tp2dp2", "dp2"), ("one", "tp2")])
def test_whole_state_continues_in_another_layout(name: str, layout: str, other: str) -> None:
    """Steps 1-3 in one layout, the last two in another, equal five steps in one process."""
    _needs(name)
    tp, dp = LAYOUTS[layout]
    ranks = [r[0] for r in run(trained, tp * dp, [Case(name, tp, dp, last=3)])]
    states = _states(ranks)
    weights = whole([rank.shards for rank in ranks], tp)
    assert states.keys() == weights.keys()
    tp, dp = LAYOUTS[other]
    resumed = run(trained, tp * dp, [Case(name, tp, dp, first=4)], weights, states)
    assert _difference(whole([r[0].shards for r in resumed], tp), _expected(name)) < 1e-6
    forgetful = run(trained, 1, [Case(name, first=4)], weights)
    assert _difference(whole([r[0].shards for r in forgetful], 1), _expected(name)) > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_resumes_bit_for_bit(name: str) -> None:
    """What a checkpoint keeps: whole states, flat pieces and counters."""
    _needs(name)
    case = Case(name, 2, 2)
    through, first = run(trained, 4, [case]), run(trained, 4, [replace(case, last=3)])
    ranks = [rank[0] for rank in first]
    arguments = (None, _states(ranks) or None, [r.pieces for r in ranks], ranks[0].counters)
    resumed = run(trained, 4, [replace(case, first=4)], *arguments)
    for rank, other in zip(through, resumed, strict=True):
        assert _difference(rank[0].shards, other[0].shards) == 0.0


def _states(ranks: list[Result]) -> dict[str, dict[str, Any]]:
    states: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        assert not states.keys() & rank.state.keys(), "two ranks own one matrix"
        states |= rank.state
    return states


def test_muon_owns_the_matrices_of_blocks_alone_and_shares_them_out() -> None:
    ranks = [r[0] for r in run(trained, 2, [Case("muon", dp=2, last=1)])]
    assert sorted(_states(ranks)) == ["1.mlp.down.weight", "1.mlp.up.weight"]
    assert all(len(rank.state) == 1 for rank in ranks)
    kept = {
        name for rank in ranks for name, (tensors, _) in rank.pieces.items() if "exp_avg" in tensors
    }
    assert kept == {"0.weight", "1.norm", "2.weight"}


def test_bf16_steps_on_the_fp32_weights_as_one_process_does() -> None:
    """DeepSpeed's bf16 optimizer has other buffers. The gradients are given: bf16 blurs them."""
    names = [name for name in NAMES if _installed(name)]
    cases = [Case(name, dp=2, dtype="bf16", given=True) for name in names]
    ranks = run(trained, 2, cases)
    assert ranks[0][0].kind == "BF16_Optimizer"
    for i, name in enumerate(names):
        expected, norms = plain_loop(name, plain, given=True)
        assert min(norms) > CLIP
        assert _difference(whole([r[i].shards for r in ranks], 1), expected) < 1e-6, name


@pytest.mark.parametrize(("zero", "dtype"), [(1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
def test_schedule_free_evaluates_the_average_and_returns_exactly(zero: int, dtype: str) -> None:
    name = "adamwschedulefree"
    _needs(name)
    cases = [
        Case(name, dp=2, zero=zero, dtype=dtype, evaluate=evaluate) for evaluate in (True, False)
    ]
    ranks = run(trained, 2, cases)
    visited, stayed = (whole([r[i].shards for r in ranks], 1) for i in (0, 1))
    assert _difference(visited, stayed) == 0.0
    average = whole([r[0].evaluated for r in ranks], 1)
    expected, _ = plain_loop(name, plain, evaluate=True)
    assert _difference(average, expected) < (1e-6 if dtype == "fp32" else 2e-2)
    assert _difference(average, visited) > 1e-3
    assert ranks[0][0].counters["k"] == 5


def test_evaluation_weight_is_what_the_library_evaluates() -> None:
    _needs("adamwschedulefree")
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5))
    (rule,) = plain([("x", parameter)], settings("adamwschedulefree"))
    for _ in range(3):
        parameter.grad = torch.randn(5)
        rule.step()
    average = evaluation_weight(parameter.detach().clone(), rule.state[parameter]["z"], 0.9)
    rule.eval()  # type: ignore[attr-defined]
    assert torch.equal(average, parameter)


def test_vectors_are_not_decayed_and_empty_groups_are_left_out() -> None:
    named = list(build(SERIAL, VOCAB).named_parameters())
    groups = {g["name"]: g for g in parameter_groups(named, 0.1, 0.2)}
    count = {name: len(group["params"]) for name, group in groups.items()}
    assert count == {"hidden": 2, "vocabulary": 2, "vectors": 1}
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {"hidden": 0.2, "vocabulary": 0.2, "vectors": 0.0}
    matrices, others = [], []
    for _, tensor in named:
        (matrices if tensor.dim() > 1 else others).append(tensor.numel())
    assert decay_text(list(groups.values())) == (
        f"weight decay on this rank: 4 tensors with {sum(matrices):,} parameters; "
        f"none on 1 tensors with {sum(others):,} parameters"
    )
    assert [g["name"] for g in parameter_groups(named[1:2], 0.1, 0.2)] == ["vectors"]


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(table.importlib, "import_module", missing)
    named = [("1.mlp.up.weight", nn.Parameter(torch.zeros(2, 2)))]
    with pytest.raises(ValueError, match="pip install pytorch-optimizer"):
        table.make_optimizer(settings("lamb"), named)
    with pytest.raises(ValueError, match="pip install schedulefree"):
        table.make_optimizer(settings("adamwschedulefree"), named)


def test_whole_matrix_rule_is_harmless_before_and_strict_without_bind() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    rule = table.make_optimizer(settings("adafactor"), [("1.mlp.up.weight", parameter)])
    parameter.grad = torch.zeros(2, 2)
    rule.step()
    assert torch.equal(parameter, torch.ones(2, 2)) and not rule.state
    parameter.grad.fill_(1.0)
    with pytest.raises(AssertionError, match="bind"):
        rule.step()
