"""What the probes see of a tiny run's steps, and the same from plain tensors of one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron.model.stack import Stack
from megatron.parallel.control import make_control
from megatron.training.build import model_layers
from megatron.training.probes import Probes
from tests.equivalence.front import build, micro_batches, run_config, samples

ASKED = {
    "LOG_PARAMS_NORM": "1",
    "LOG_NUM_ZEROS_IN_GRAD": "1",
    "LOG_OPTIMIZER_STATES": "1",
}
COUNT = 2  # steps


def probed(variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """After each step, on this rank."""
    run, control = run_config({**variables, **ASKED}), make_control()
    engine = build(run, large=True)
    probes = Probes(run, engine, control)
    found = []
    for step in range(COUNT):
        probes.before_step(step + 1)
        engine.set_learning_rate(run.optimizer.learning_rate)
        engine.train_batch(micro_batches(run, engine.groups, step))
        found.append(probes.measured())
    return found


def plain(variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """With torch's AdamW and no engine, from whole gradients and states; one process."""
    run = run_config(variables)
    modules = Stack(model_layers(run), 0)
    o = run.optimizer
    rule = torch.optim.AdamW(
        [
            {"params": [p for p in modules.parameters() if p.dim() > 1]},
            {"params": [p for p in modules.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=o.learning_rate, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps,
        weight_decay=o.weight_decay,
    )  # fmt: skip
    found = []
    for step in range(COUNT):
        batch = samples(run, step)
        rule.zero_grad()
        modules(batch[:, :-1], batch[:, 1:]).backward()
        zeros = sum(
            int((_used(p.grad, p, run.model.vocab_size) == 0).sum()) for p in modules.parameters()
        )
        torch.nn.utils.clip_grad_norm_(modules.parameters(), o.clip_grad)
        rule.step()
        states = [rule.state[p] for p in modules.parameters()]
        values = {
            "weight": [p.detach() for p in modules.parameters()],
            "momentum": [s["exp_avg"] for s in states],
            "variance": [s["exp_avg_sq"] for s in states],
            "variance_sqrt": [s["exp_avg_sq"].sqrt() for s in states],
        }
        statistics: dict[str, float] = {}
        for name, tensors in values.items():
            every = torch.cat([tensor.flatten() for tensor in tensors]).double()
            statistics[f"{name}_l2"] = float(every.norm())
            statistics[f"{name}_l1"] = float(every.abs().sum())
            statistics[f"{name}_abs_max"] = float(every.abs().max())
        found.append(
            {
                "params_norm": statistics["weight_l2"],
                "num_zeros": zeros,
                "optimizer_states": statistics,
            }
        )
    return found


def _used(gradient: Any, parameter: torch.nn.Parameter, vocab_size: int) -> torch.Tensor:
    return gradient[:vocab_size] if getattr(parameter, "is_vocabulary", False) else gradient
