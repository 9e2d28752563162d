"""Settings of training without effect beside the others: each is named, with what it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from megatron.config.schema import RunConfig, by_key


class Use(NamedTuple):
    """Where an option acts, in words too."""

    acts: Callable[[RunConfig], bool]
    where: str


def _rule(*names: str) -> Use:
    return Use(lambda run: run.optimizer.optimizer in names, f"OPT={' or '.join(names)}")


def _style(start: str) -> Use:
    return Use(
        lambda run: run.optimizer.lr_decay_style.startswith(start),
        f"LR_DECAY_STYLE={start}{'*' if start.endswith('-') else ''}",
    )


_SAVES = Use(lambda run: not run.optimizer.lr_finder, "runs that save, which LR_FINDER=1 does not")
_SCHEDULE = Use(lambda run: not run.optimizer.lr_finder, "runs without LR_FINDER=1")
_ADAM = _rule("adamw", "adam", "lamb", "adamwschedulefree", "muon")
_WANDB = Use(
    lambda run: not run.log.wandb_disabled and run.log.wandb_mode != "disabled",
    "runs with Weights & Biases",
)
_USES: dict[str, Use] = {
    "optimizer.sgd_momentum": _rule("sgd"),
    "optimizer.muon_momentum": _rule("muon"),
    "optimizer.sophia_rho": _rule("sophiag"),
    "optimizer.sophia_beta1": _rule("sophiag"),
    "optimizer.sophia_beta2": _rule("sophiag"),
    "optimizer.sophia_hessian_interval": _rule("sophiag"),
    "optimizer.adam_beta1": _ADAM,
    "optimizer.adam_beta2": _ADAM,
    "optimizer.adam_eps": _ADAM,
    "optimizer.lr_cooldown_fraction": _style("infinite-"),
    "optimizer.lr_constant": _style("infinite-"),
    "optimizer.lr_constant_fraction": _style("infinite-"),
    "optimizer.lr_timescale": _style("infinite-inv-square-root"),
    "optimizer.lr_decay_fraction": _style("warmup-stable-decay"),
    "optimizer.lr_decay_style": _SCHEDULE,
    "optimizer.lr_warmup_fraction": _SCHEDULE,
    "optimizer.lr_warmup_iters": _SCHEDULE,
    "optimizer.lr_warmup_tokens": _SCHEDULE,
    "optimizer.lr_warmup_samples": _SCHEDULE,
    "optimizer.weight_decay": Use(
        lambda run: run.optimizer.weight_decay_incr_style == "constant",
        "WEIGHT_DECAY_INCR_STYLE=constant",
    ),
    "checkpoint.async_save": _SAVES,
    "checkpoint.export_hf": _SAVES,
    "checkpoint.save_interval": _SAVES,
    "checkpoint.keep_last": _SAVES,
    "checkpoint.keep_every": _SAVES,
    "checkpoint.keep_best": _SAVES,
    "log.tensorboard_dir": Use(lambda run: not run.log.no_tensorboard, "runs with TensorBoard"),
    "log.wandb_exp_name": _WANDB,
}
"""Option -> where it acts; a value that is not the default's is named elsewhere."""


def unused(run: RunConfig, given: Mapping[str, str]) -> list[str]:
    """A warning for each setting of training that has no effect.

    Args:
        run: the configuration.
        given: option -> variable or flag, of what the user set.
    """
    warnings = []
    for key, use in _USES.items():
        section, _, field = key.partition(".")
        value = getattr(getattr(run, section), field)
        if key in given and value not in (by_key()[key].default, None) and not use.acts(run):
            shown = int(value) if isinstance(value, bool) else value
            warnings.append(f"{given[key]}={shown} has no effect here: it is for {use.where}")
    sizes = run.batch_sizes
    if sizes.samples > run.total_samples:
        warnings.append(
            f"RAMPUP_BATCH_SIZE={sizes} takes {sizes.samples:,} samples, but the run has "
            f"{run.total_samples:,}: its batch stays below GLOBAL_BATCH={sizes.full}"
        )
    return warnings
