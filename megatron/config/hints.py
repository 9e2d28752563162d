"""Warnings and notes: settings that have no effect, or another effect than users may expect."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config import presets, skip
from megatron.config.layout import crossing_warning
from megatron.config.schema import RunConfig
from megatron.config.unused import unused


def warnings(run: RunConfig, given: Mapping[str, str]) -> list[str]:
    """Settings that have no effect, or a costly one.

    Args:
        run: the configuration.
        given: option -> variable or flag, of what the user set.
    """
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
    if run.train.float8 in ("1", "rowwise") and run.train.compile == "0":
        warnings.append(
            f"FP8={run.train.float8} is fast in compiled layers only, where scaling is part of "
            "other kernels: unset COMPILE"
        )
    if run.checkpoint.finetune and run.checkpoint.no_load_optim:
        warnings.append("NO_LOAD_OPTIM has no effect with FINETUNE: a new run's optimizer is new")
    late = [pair for pair in run.skip_ranges if pair[1] > run.train.train_iters]
    if late:
        warnings.append(
            f"TRAIN_RANGE_TO_SKIP: {skip.ranges_text(tuple(late))} extends past the last step, "
            f"{run.train.train_iters}"
        )
    data = run.data
    if data.order == "stateless" and data.blend_sample_in_corpus:
        warnings.append(
            "BLEND_SAMPLE_IN_CORPUS=1 changes nothing with DATA_ORDER=stateless: it always blends"
        )
    if data.order == "stateless" and data.cache_path and not data.data:
        warnings.append(
            f"DATA_CACHE_PATH={data.cache_path} has no effect with DATA_ORDER=stateless, "
            "which needs no cache, and without DATA"
        )
    return warnings + unused(run, given)


def notes(run: RunConfig) -> list[str]:
    """Settings that act differently than their names suggest."""
    twin = presets.alike_note(run.model.model_arch)
    notes = [twin] if twin else []
    if run.parallel.zero_stage == 0:
        notes.append(
            "ZERO_STAGE=0 runs as stage 1 with fp32 gradient accumulation: the same update with "
            "less memory, and under PP with correct clipping"
        )
    if run.checkpoint.no_load_rng:
        notes.append(
            "NO_LOAD_RNG leaves nothing out: a checkpoint holds no random state, since samples and "
            "weights follow from SEED and their number"
        )
    return notes
