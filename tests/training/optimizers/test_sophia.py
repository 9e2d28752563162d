"""Sophia's labels come from the model's own distribution and do not depend on the layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.layout import Layout
from megatron.parallel.groups import SERIAL, make_groups
from megatron.training.optimizers.sophia import SophiaG, hessian_step, label_draws, sample_labels
from tests.spawn import run

VOCAB = 11


def _logits() -> Tensor:
    """(4, 500, 16), the last five columns padding with the highest logits of all."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 1, 16, generator=generator).expand(4, 500, 16).clone()
    logits[..., VOCAB:] = 50.0
    return logits


def _sampled() -> Tensor:
    groups = make_groups(Layout(tp=dist.get_world_size(), pp=1, dp=1))
    local = _logits().chunk(groups.tp.size, dim=-1)[groups.tp.rank]
    return sample_labels(local, label_draws(1, 1, [0, 1, 2, 3], 500), groups.tp, VOCAB)


def test_labels_follow_the_softmax_without_padding() -> None:
    logits = _logits()
    labels = sample_labels(logits, label_draws(1, 1, [0, 1, 2, 3], 500), SERIAL, VOCAB)
    share = torch.bincount(labels.flatten(), minlength=VOCAB) / labels.numel()
    expected = logits[0, 0, :VOCAB].softmax(-1)
    # Binomial: three standard deviations of 2000 draws are at most 0.034.
    assert float((share - expected).abs().max()) < 0.034
    assert torch.equal(logits, _logits())  # read, not written
    assert int(labels.max()) < VOCAB


@pytest.mark.parametrize("tp", [2, 4])
def test_labels_are_those_of_one_process(tp: int) -> None:
    expected = sample_labels(_logits(), label_draws(1, 1, [0, 1, 2, 3], 500), SERIAL, VOCAB)
    for labels in run(_sampled, tp):
        assert torch.equal(labels, expected)


def test_a_draw_depends_on_seed_step_sample_and_position_alone() -> None:
    draws = label_draws(1, 2, [5, 6], 8)
    assert draws.dtype == torch.float64 and draws.shape == (2, 8)
    assert bool(((draws >= 0) & (draws < 1)).all())
    assert torch.equal(label_draws(1, 2, [6], 8)[0], draws[1])
    assert torch.equal(label_draws(1, 2, [5], 3)[0], draws[0, :3])
    others = [label_draws(2, 2, [5], 8), label_draws(1, 3, [5], 8), label_draws(1, 2, [7], 8)]
    assert all(not bool((other[0] == draws[0]).any()) for other in others)
    # Samples next to each other share no number.
    assert not set(label_draws(1, 2, [0], 99)[0].tolist()) & set(
        label_draws(1, 2, [1], 99)[0].tolist()
    )


def test_a_hessian_step_leaves_weight_and_momentum_alone() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    rule = SophiaG([parameter], lr=0.1, betas=(0.9, 0.8), rho=0.5, weight_decay=0.0)
    parameter.grad = torch.tensor([3.0, 0.0])
    with pytest.raises(RuntimeError, match="inside"), hessian_step(rule, tokens=10):
        rule.step()
        raise RuntimeError("inside")
    assert torch.equal(parameter, torch.tensor([1.0, -2.0]))
    assert torch.allclose(rule.state[parameter]["hessian"], torch.tensor([0.2 * 10 * 9.0, 0.0]))
    assert not rule.state[parameter]["exp_avg"].any()
    parameter.grad = torch.tensor([36.0, 5.0])
    rule.step()
    # Momentum (3.6, 0.5) over rho x hessian (9, 0): 0.4 as it is, and clipped to 1.
    assert torch.allclose(parameter, torch.tensor([1.0 - 0.04, -2.0 - 0.1]))


def test_the_rule_is_the_librarys_given_the_same_estimate() -> None:
    """pytorch-optimizer clips at rho before it multiplies by the rate: lr/rho is our lr."""
    library = pytest.importorskip("pytorch_optimizer")
    rho, lr, decay = 0.05, 1e-2, 0.1
    torch.manual_seed(0)
    start = torch.randn(50)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rule = SophiaG([ours], lr=lr, betas=(0.9, 0.95), rho=rho, weight_decay=decay)
    reference = library.SophiaH(
        [theirs], lr=lr / rho, betas=(0.9, 0.95), p=rho, weight_decay=decay * rho, eps=1e-30
    )
    for _ in range(4):
        estimate, gradient = torch.randn(50), torch.randn(50)
        ours.grad = estimate.clone()
        with hessian_step(rule, tokens=7):
            rule.step()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        rule.step()
        reference.step(hessian=[7 * estimate * estimate])
    assert torch.allclose(ours, theirs, atol=1e-6)
