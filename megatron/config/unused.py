"""Where a setting of training acts beside the others; one without effect is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron.config.schema import RunConfig, by_key

Flat = Mapping[str, Any]  # option key -> value; an older version's may lack some


class Use(NamedTuple):
    """Where an option acts, in words too."""

    acts: Callable[[Flat], bool]
    where: str


def _chosen(key: str, *values: str) -> Use:
    """Acts with some values of another option."""
    name = by_key()[key].name
    return Use(lambda flat: flat.get(key) in values, f"{name}={' or '.join(values)}")


def _style(start: str) -> Use:
    return Use(
        lambda flat: str(flat.get("optimizer.lr_decay_style")).startswith(start),
        f"LR_DECAY_STYLE={start}{'*' if start.endswith('-') else ''}",
    )


def _unless(key: str, where: str) -> Use:
    return Use(lambda flat: not flat.get(key), where)


_SAVES = _unless("optimizer.lr_finder", "runs that save, which LR_FINDER=1 does not")
_SCHEDULE = _unless("optimizer.lr_finder", "runs without LR_FINDER=1")
_ADAM = _chosen("optimizer.optimizer", "adamw", "adam", "lamb", "adamwschedulefree", "muon")
_SOPHIA = _chosen("optimizer.optimizer", "sophiag")
_INFINITE = _style("infinite-")
_GUARDED = _chosen("stability.spike_policy", "warn", "skip", "rollback")
_ROLLBACK = _chosen("stability.spike_policy", "rollback")
_GROWS = _chosen("optimizer.weight_decay_incr_style", "linear", "cosine")
_EVALUATES = Use(lambda flat: flat.get("log.eval_interval") != 0, "EVAL_INTERVAL above 0")
_WANDB = Use(
    lambda flat: not flat.get("log.wandb_disabled") and flat.get("log.wandb_mode") != "disabled",
    "runs with Weights & Biases",
)
_PROFILED = _chosen("log.profile", "torch", "pyinstrument")
USES: dict[str, Use] = {
    "optimizer.sgd_momentum": _chosen("optimizer.optimizer", "sgd"),
    "optimizer.muon_momentum": _chosen("optimizer.optimizer", "muon"),
    "optimizer.sophia_rho": _SOPHIA,
    "optimizer.sophia_beta1": _SOPHIA,
    "optimizer.sophia_beta2": _SOPHIA,
    "optimizer.sophia_hessian_interval": _SOPHIA,
    "optimizer.adam_beta1": _ADAM,
    "optimizer.adam_beta2": _ADAM,
    "optimizer.adam_eps": _ADAM,
    "optimizer.lr_cooldown_fraction": _INFINITE,
    "optimizer.lr_constant": _INFINITE,
    "optimizer.lr_constant_fraction": _INFINITE,
    "optimizer.lr_timescale": _style("infinite-inv-square-root"),
    "optimizer.lr_decay_fraction": _style("warmup-stable-decay"),
    "optimizer.lr_decay_style": _SCHEDULE,
    "optimizer.lr_warmup_fraction": _SCHEDULE,
    "optimizer.lr_warmup_iters": _SCHEDULE,
    "optimizer.lr_warmup_tokens": _SCHEDULE,
    "optimizer.lr_warmup_samples": _SCHEDULE,
    "optimizer.weight_decay": Use(
        lambda flat: not _GROWS.acts(flat), "WEIGHT_DECAY_INCR_STYLE=constant"
    ),
    "optimizer.start_weight_decay": _GROWS,
    "optimizer.end_weight_decay": _GROWS,
    "stability.spike_threshold": _GUARDED,
    "stability.spike_window": _GUARDED,
    "stability.rollback_steps": _ROLLBACK,
    "stability.max_rollbacks": _ROLLBACK,
    "checkpoint.async_save": _SAVES,
    "checkpoint.export_hf": _SAVES,
    "checkpoint.save_interval": _SAVES,
    "checkpoint.keep_last": _SAVES,
    "checkpoint.keep_every": _SAVES,
    "checkpoint.keep_best": _SAVES,
    "data.data_key": Use(lambda flat: bool(flat.get("data.data")), "DATA"),
    "train.compile": Use(
        lambda flat: flat.get("parallel.zero_stage") != 3 or flat["train.compile"] == "0",
        "ZERO_STAGE 0 to 2",
    ),
    "data.valid_data_file_list": _EVALUATES,
    "data.test_data_file_list": _EVALUATES,
    "log.tensorboard_dir": _unless("log.no_tensorboard", "runs with TensorBoard"),
    "log.wandb_exp_name": _WANDB,
    "log.wandb_run_id": _WANDB,
    "log.wandb_group": _WANDB,
    "log.wandb_tags": _WANDB,
    "log.wandb_notes": _WANDB,
    "log.wandb_dir": _WANDB,
    "log.profile_steps": _PROFILED,
    "log.profile_ranks": _PROFILED,
    "log.trace_dir": _PROFILED,
}
"""Option -> where it acts; the others always do."""


def flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` -> value, from sections as `RunConfig.to_dict` gives them."""
    return {
        f"{section}.{name}": value
        for section, fields in sections.items()
        if isinstance(fields, Mapping)
        for name, value in fields.items()
    }


def unused(run: RunConfig, given: Mapping[str, str]) -> list[str]:
    """A warning for each setting of training that has no effect.

    Args:
        run: the configuration.
        given: option -> variable or flag, of what the user set.
    """
    warnings, values = [], flat(run.to_dict())
    for key, use in USES.items():
        value, usual = values[key], by_key()[key].default
        if key in given and value not in (usual, None) and not use.acts(values):
            shown = f"{value:g}" if isinstance(value, float | bool) else value
            warnings.append(f"{given[key]}={shown} has no effect here: it is for {use.where}")
    sizes = run.batch_sizes
    if sizes.samples > run.total_samples:
        warnings.append(
            f"RAMPUP_BATCH_SIZE={sizes} takes {sizes.samples:,} samples, but the run has "
            f"{run.total_samples:,}: its batch stays below GLOBAL_BATCH={sizes.full}"
        )
    return warnings
