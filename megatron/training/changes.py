"""What differs between a checkpoint's settings and those that resume it, where numbers change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from megatron.config.pace import learning_rates
from megatron.config.schedule import STYLES
from megatron.config.schema import OptimizerConfig, RunConfig, TrainConfig, by_key
from megatron.config.unused import USES, flat

NUMBERS = (
    "model.seq_length",
    "train.global_batch_size", "train.train_iters", "train.seed", "train.dtype", "train.float8",
    "train.grad_reduce_in_bf16", "train.rampup_batch_size",
    "optimizer.learning_rate", "optimizer.min_learning_rate", "optimizer.lr_decay_style",
    "optimizer.lr_warmup_fraction",
    "optimizer.lr_finder", "optimizer.lr_decay_iters", "optimizer.lr_cooldown_fraction",
    "optimizer.lr_constant", "optimizer.lr_constant_fraction", "optimizer.lr_timescale",
    "optimizer.lr_decay_fraction", "optimizer.adam_beta1", "optimizer.adam_beta2",
    "optimizer.adam_eps", "optimizer.sgd_momentum", "optimizer.muon_momentum",
    "optimizer.sophia_rho", "optimizer.sophia_beta1", "optimizer.sophia_beta2",
    "optimizer.sophia_hessian_interval", "optimizer.weight_decay_incr_style",
    "optimizer.start_weight_decay", "optimizer.end_weight_decay",
    "optimizer.weight_decay", "optimizer.clip_grad",
    "stability.spike_policy", "stability.spike_threshold", "stability.spike_window",
    "stability.rollback_steps",
    "log.eval_iters", "data.valid_data_file_list", "data.test_data_file_list",
    "data.eod_mask_loss", "data.reset_position_ids", "data.reset_attention_mask",
)  # fmt: skip
"""Settings that change losses beyond rounding; a change is said."""

AT_START = ("model.init_method_std", "model.word_embedding_init_std")
"""Settings that act on a run's first weights only; a change is said to have no effect."""

COMPARED_ELSEWHERE = (
    # ModelShape.changes_since refuses these, but for the preset's name.
    "model.model_arch", "model.architecture", "model.num_layers", "model.hidden_size",
    "model.num_attention_heads", "model.num_key_value_heads", "model.head_dim",
    "model.ffn_hidden_size", "model.tie_embeddings", "model.nope_interval", "model.rope_theta",
    "model.rope_scaling", "model.rms_norm_eps", "model.vocab_size",
    "optimizer.optimizer",  # resume.py refuses
    # The record of the data: training/run_data.py refuses, or says what a new stage changes.
    "data.data", "data.data_key", "data.data_file_list", "data.order",
    "data.blend_sample_in_corpus",
    "data.shuffle_sample_in_corpus", "data.train_data_exact_num_epochs", "data.train_split",
    "data.valid_split", "data.test_split", "data.tokenizer_type", "data.tokenizer_model",
    "data.train_range_to_skip",  # resume.py adds them up
)  # fmt: skip
"""Settings whose changes are refused or said by what compares them."""

SAME_NUMBERS = (
    # The layout, memory and kernels: other rounding at most.
    "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.pipeline_schedule",
    "parallel.pipeline_cuts", "parallel.sequence_parallel", "parallel.megatron_sequence_parallel",
    "parallel.zero_stage", "parallel.zero_hpz_partition_size", "parallel.mics_shard_size",
    "parallel.cpu_optimizer", "parallel.engine", "parallel.world_size",
    "train.micro_batch_size", "train.gradient_accumulation_steps",
    "train.activation_checkpointing", "train.checkpoint_num_layers", "train.compile",
    "train.no_flash_attention",
    "train.train_tokens",  # TRAIN_ITERS follows from it
    "train.train_samples", "train.exit_duration_mins", "train.exit_interval",
    # LR_WARMUP_FRAC and LR_DECAY_ITERS follow from them.
    "optimizer.lr_warmup_iters", "optimizer.lr_warmup_samples", "optimizer.lr_warmup_tokens",
    "optimizer.lr_decay_samples", "optimizer.lr_decay_tokens",
    "data.cache_path", "data.allow_data_change",
    "checkpoint.run_name", "checkpoint.run_dir", "checkpoint.save", "checkpoint.load",
    "checkpoint.save_interval", "checkpoint.exit_on_missing_checkpoint", "checkpoint.async_save",
    "checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.keep_best",
    "checkpoint.export_hf", "checkpoint.resume", "checkpoint.finetune", "checkpoint.no_load_optim",
    "checkpoint.no_load_rng",
    "stability.max_rollbacks", "stability.max_bad_steps",
    "log.log_interval", "log.eval_interval", "log.wandb_project", "log.wandb_mode",
    "log.wandb_disabled", "log.no_tensorboard", "log.tensorboard_dir", "log.wandb_exp_name",
    "log.wandb_run_id", "log.wandb_group", "log.wandb_tags", "log.wandb_notes", "log.wandb_dir",
    "log.timing_log_level", "log.profile", "log.profile_steps", "log.profile_ranks",
    "log.trace_dir",
    "log.log_params_norm", "log.log_num_zeros_in_grad", "log.log_optimizer_states",
    "log.log_corpus_loss", "log.sample_prompt", "log.sample_interval", "log.dump_tokens",
    "log.dump_skipped_iters", "log.log_level", "log.log_from_all_ranks", "log.log_style",
    "log.debug", "log.dry_run",
    "launch.hostfile", "launch.num_hosts", "launch.devices_per_host", "launch.cpu_bind",
    "launch.retries", "launch.hang_timeout", "launch.launch_with", "launch.device",
    "launch.distributed_timeout_minutes", "launch.ignore_variables",
)  # fmt: skip
"""Settings that a resume may change without a word."""


_ACTING = ("skip", "rollback")
_NUMBERS_WHERE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    key: lambda settings: settings.get("stability.spike_policy") in _ACTING
    for key in ("stability.spike_policy", "stability.spike_threshold", "stability.spike_window")
}
"""Setting -> whether it changes numbers where it acts: a warning does not."""


def model_changes(run: RunConfig, stored: Mapping[str, Any]) -> dict[str, str]:
    """Field -> `NAME before -> now` of each difference from the model of a checkpoint."""
    rows = [line.split(" ", 1) for line in run.model.changes_since(stored)]
    return {field: f"{by_key()[f'model.{field}'].name} {values}" for field, values in rows}


def changes_text(run: RunConfig, stored: Mapping[str, Any], done: int) -> str:
    """Every setting that changes numbers, before and now, and the learning rate of the next step.

    Args:
        run: that resumes.
        stored: the checkpoint's configuration, as `RunConfig.to_dict` gave it; an older version
            may lack sections and fields, and an imported model has none.
        done: steps of the checkpoint.

    Returns:
        Lines for the log; empty where nothing changes.
    """
    if not stored:
        return ""
    before, now = _flat(stored), _flat(run.to_dict())
    rows = [
        (by_key()[key].name, before[key], now[key], key in AT_START)
        for key in (*NUMBERS, *AT_START)
        if key in before and before[key] != now[key] and _is_used(key, before, now)
    ]
    if not rows:
        return ""
    width = max(len(name) for name, *_ in rows)
    lines = [f"settings that differ from those of the checkpoint of step {done}:"]
    for name, old, new, idle in rows:
        note = "   (no effect: the weights are the checkpoint's)" if idle else ""
        lines.append(f"  {name:{width}}  {_text(old)} -> {_text(new)}{note}")
    rates = _rates(run, stored, done + 1)
    if rates:
        lines.append(f"  the learning rate of step {done + 1}: {rates[0]:.6g} -> {rates[1]:.6g}")
    return "\n".join(lines)


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` -> value.

    A field that an older version lacks had today's default, and so had the whole of `stability`.
    """
    present = {*sections, "stability"}
    values = {
        key: option.default
        for key, option in by_key().items()
        if key.partition(".")[0] in present and option.default is not None
    }
    values |= flat(sections)
    for name in ("beta1", "beta2"):  # sophiag had Adam's before it had its own
        if f"sophia_{name}" not in sections.get("optimizer", {}):
            values[f"optimizer.sophia_{name}"] = values.get(f"optimizer.adam_{name}")
    return values


def _is_used(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    acts = _NUMBERS_WHERE.get(key) or (USES[key].acts if key in USES else None)
    return acts is None or acts(before) or acts(now)


def _rates(run: RunConfig, stored: Mapping[str, Any], step: int) -> tuple[float, float] | None:
    """The rate of a step by the stored schedule and by this one; None where they agree."""
    before = run
    for section, kind in (("optimizer", OptimizerConfig), ("train", TrainConfig)):
        names = {field.name for field in dataclasses.fields(kind)}
        known = {name: v for name, v in stored.get(section, {}).items() if name in names}
        part = dataclasses.replace(getattr(run, section), **known)
        before = dataclasses.replace(before, **{section: part})
    if before.optimizer.lr_decay_style not in STYLES:
        return None
    rates = learning_rates(before)(step), learning_rates(run)(step)
    return rates if rates[0] != rates[1] else None


def _text(value: Any) -> str:
    """A value as a user would set it."""
    if value is None:
        return "unset"
    return str(int(value)) if isinstance(value, bool) else str(value)
