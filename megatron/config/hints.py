"""Warnings and notes: settings that have no effect, or another effect than users may expect."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from megatron.config import presets, schema, skip
from megatron.config.layout import crossing_warning
from megatron.config.schema import RunConfig

# What other frameworks call our options.
FOREIGN_SPELLINGS = {
    "NUM_HEADS": "HEADS", "N_HEADS": "HEADS", "N_LAYERS": "NLAYERS", "N_LAYER": "NLAYERS",
    "D_MODEL": "HIDDEN", "FFN_SIZE": "FFN_HIDDEN_SIZE", "NUM_KV_HEADS": "NUM_KV_HEAD",
    "TP_SIZE": "TP", "PP_SIZE": "PP", "SP_SIZE": "SP",
    "TENSOR_PARALLEL": "TP", "PIPELINE_PARALLEL": "PP",
    "LEARNING_RATE": "LR", "MAX_LR": "LR", "WARMUP_FRAC": "LR_WARMUP_FRAC",
    "BATCH_SIZE": "MICRO_BATCH", "GRAD_ACCUM_STEPS": "GRAD_ACC_STEPS", "ZERO": "ZERO_STAGE",
    "TOKENIZER": "TOKENIZER_MODEL", "DATA_LIST": "DATA_FILE_LIST", "PRECISION": "DTYPE",
    "CHECKPOINT_DIR": "CKPT_DIR", "NGPUS_PER_HOST": "NGPU_PER_HOST",
}  # fmt: skip

# Variables of the AuroraGPT launcher that are not needed here, and why.
WITHOUT_EFFECT = {
    "NO_LLAMA": "every model is Llama-shaped",
    "OVERRIDE_CKPT_OPT_PARAM": "the options given now always hold",
    "DATA_PARENT": "set DATA_FILE_LIST",
    "TIMING_LOG_LEVEL": "steps are timed without it",
    "TIMING_STR": "give flags on the command line",
    "COMMS_LOGGER": "there is no communication log",
    "EXEC": "the entry point is pretrain_gpt_alcf.py",
}

# Variables of shells, compilers and schedulers that happen to resemble ours.
NOT_OURS = frozenset(("COMPILER", "HOSTNAME", "HOSTTYPE", "HOST", "HOSTS", "LOCAL_WORLD_SIZE"))
NOT_OURS_PREFIXES = (
    "PBS_", "SLURM_", "PMI_", "PMIX_", "PALS_", "OMPI_", "MPICH_", "NCCL_", "CCL_", "FI_", "ZE_",
    "SYCL_", "CUDA_", "HIP_", "ROCR_", "TORCH_", "TORCHELASTIC_", "OMP_", "MKL_", "CONDA_", "XDG_",
    "LC_", "SSH_", "HF_", "GITHUB_", "EZPZ_", "_",
)  # fmt: skip

CLOSE = 0.85  # one letter added, removed or changed in a word of seven


def misspelt_variables(environ: Mapping[str, str]) -> list[str]:
    """One warning for each variable that is set and resembles one of ours."""
    known = schema.by_variable()
    spelled = _flag_spellings()
    warnings: list[str] = []
    for name in sorted(environ):
        if name in known or not environ[name].strip() or name in NOT_OURS:
            continue
        if name in WITHOUT_EFFECT:
            warnings.append(f"{name} has no effect here: {WITHOUT_EFFECT[name]}")
            continue
        meant = FOREIGN_SPELLINGS.get(name) or spelled.get(name) or _closest(name, known)
        if meant:
            warnings.append(f"{name}={environ[name]} has no effect: the variable is called {meant}")
    return warnings


def warnings(run: RunConfig) -> list[str]:
    """Settings that have no effect, or a costly one."""
    warnings = []
    crossing = crossing_warning(run.layout, run.launch.devices_per_host)
    if crossing:
        warnings.append(crossing)
    if run.parallel.megatron_sequence_parallel and run.parallel.tensor_parallel == 1:
        warnings.append("SEQUENCE_PARALLEL has no effect with TP=1: it shards over the TP ranks")
    layers, recompute = run.train.checkpoint_num_layers, run.train.activation_checkpointing
    if layers > 1 and recompute != "1":
        warnings.append(
            f"ACT_CKPT_NUM_LAYERS={layers} has no effect with "
            f"USE_ACTIVATION_CHECKPOINTING={recompute}: it groups whole layers, "
            "which only 1 recomputes"
        )
    late = [pair for pair in run.skip_ranges if pair[1] > run.train.train_iters]
    if late:
        warnings.append(
            f"TRAIN_RANGE_TO_SKIP: {skip.ranges_text(tuple(late))} extends past the last step, "
            f"{run.train.train_iters}"
        )
    return warnings + _unused_stability(run.stability)


def _unused_stability(chosen: schema.StabilityConfig) -> list[str]:
    """Settings of a spike policy other than the one that is chosen."""
    usual, policy = schema.StabilityConfig(), chosen.spike_policy
    users = {
        "spike_threshold": ("warn", "skip", "rollback"),
        "spike_window": ("warn", "skip", "rollback"),
        "rollback_steps": ("rollback",),
        "max_rollbacks": ("rollback",),
    }
    return [
        f"{schema.by_key()[f'stability.{field}'].name}={getattr(chosen, field):g} has no effect "
        f"with SPIKE_POLICY={policy}: it is for {', '.join(policies)}"
        for field, policies in users.items()
        if policy not in policies and getattr(chosen, field) != getattr(usual, field)
    ]


def notes(run: RunConfig) -> list[str]:
    """Settings that act differently than their names suggest."""
    twin = presets.alike_note(run.model.model_arch)
    notes = [twin] if twin else []
    if run.parallel.zero_stage == 0:
        notes.append(
            "ZERO_STAGE=0 is given to DeepSpeed as stage 1 with fp32 gradient accumulation: the "
            "same update, with correct clipping under PP and less memory"
        )
    return notes


def _flag_spellings() -> dict[str, str]:
    """Flags written as variables, e.g. HIDDEN_SIZE for --hidden-size."""
    return {
        flag[2:].replace("-", "_").upper(): option.env[0]
        for flag, option in schema.by_flag().items()
        if option.env
    }


def _closest(name: str, known: Mapping[str, object]) -> str | None:
    """The variable that `name` probably misspells, if any."""
    if len(name) < 5 or not name.isupper() or name.startswith(NOT_OURS_PREFIXES):
        return None
    close = difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)
    return close[0] if close else None
