"""The table of update rules: name of OPT -> optimizer, ready for deepspeed.initialize.

Every entry gives the one-process result: elementwise rules update ZeRO's flat partitions directly,
rules for whole matrices go through WholeMatrixOptimizer (ZeRO-1).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from megatron.config.errors import ConfigError
from megatron.config.schema import OptimizerConfig
from megatron.config.update_rules import RULES
from megatron.training.optimizers.parameter_groups import (
    HIDDEN,
    VECTORS,
    VOCABULARY,
    decay_text,
    parameter_groups,
)
from megatron.training.optimizers.sophia import SophiaG
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer

log = logging.getLogger(__name__)

ParameterGroups = list[dict[str, Any]]
Constructor = Callable[[ParameterGroups, OptimizerConfig], Optimizer]


def make_optimizer(
    settings: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> Optimizer:
    """The optimizer that OPT names.

    Args:
        settings: the configuration's section.
        named_parameters: of the local part of the model, before DeepSpeed flattens them.

    Returns:
        A client optimizer for deepspeed.initialize; bind a `WholeMatrixOptimizer` after that.

    Raises:
        ConfigError: the rule's library is not installed.
    """
    groups = parameter_groups(named_parameters, settings.learning_rate, settings.weight_decay)
    log.info(decay_text(groups))
    make = RULES[settings.optimizer].make or OPTIMIZERS[settings.optimizer]
    return make(groups, settings)


def _adamw(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    # fused: CPU, CUDA and XPU all have the kernel.
    return torch.optim.AdamW(groups, betas=_betas(settings), eps=settings.adam_eps, fused=True)


def _adam(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    return torch.optim.Adam(groups, betas=_betas(settings), eps=settings.adam_eps, fused=True)


def _sgd(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    return torch.optim.SGD(groups, momentum=settings.sgd_momentum, fused=True)


def _muon(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    def whole(matrix: nn.Parameter, group: Mapping[str, Any]) -> Optimizer:
        # match_rms_adamw: one learning rate serves this rule and AdamW for the other groups.
        return torch.optim.Muon(
            [matrix],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=settings.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )

    return WholeMatrixOptimizer(groups, whole, {HIDDEN}, lambda others: _adamw(others, settings))


def _adafactor(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    def whole(matrix: nn.Parameter, group: Mapping[str, Any]) -> Optimizer:
        return torch.optim.Adafactor([matrix], lr=group["lr"], weight_decay=group["weight_decay"])

    return WholeMatrixOptimizer(groups, whole, {HIDDEN, VOCABULARY, VECTORS})


def _lamb(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    library = _library("lamb", "pytorch_optimizer", "pytorch-optimizer")

    def whole(matrix: nn.Parameter, group: Mapping[str, Any]) -> Optimizer:
        # The paper's rule: decay is part of the update whose norm makes the trust ratio.
        rule: Optimizer = library.Lamb(
            [matrix],
            lr=group["lr"],
            betas=_betas(settings),
            eps=settings.adam_eps,
            weight_decay=group["weight_decay"],
            weight_decouple=False,
        )
        return rule

    return WholeMatrixOptimizer(groups, whole, {HIDDEN, VOCABULARY, VECTORS})


def _adamw_schedule_free(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    library = _library("adamwschedulefree", "schedulefree", "schedulefree")
    rule = library.AdamWScheduleFree(groups, betas=_betas(settings), eps=settings.adam_eps)
    rule.train()
    optimizer: Optimizer = rule
    return optimizer


def _sophiag(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    betas = settings.sophia_beta1, settings.sophia_beta2
    return SophiaG(groups, betas=betas, rho=settings.sophia_rho)


def _betas(settings: OptimizerConfig) -> tuple[float, float]:
    return settings.adam_beta1, settings.adam_beta2


def _library(rule: str, module: str, package: str) -> Any:
    """The optional library of a rule, imported where it is used."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"OPT={rule} needs the package {package}, which is not installed: pip install {package}"
        ) from error


OPTIMIZERS: dict[str, Constructor] = {
    "adamw": _adamw,  # Loshchilov and Hutter 2019
    "adam": _adam,  # Kingma and Ba 2015; weight decay is an L2 term of the gradient
    "sgd": _sgd,  # weight decay is an L2 term of the gradient
    "muon": _muon,  # Jordan 2024; AdamW for embedding, head and norms
    "adafactor": _adafactor,  # Shazeer and Stern 2018
    "lamb": _lamb,  # You et al. 2020
    "adamwschedulefree": _adamw_schedule_free,  # Defazio et al. 2024
    "sophiag": _sophiag,  # Liu et al. 2024
}
