"""Warnings and notes: settings that have no effect, or another effect than users may expect."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.config import presets, schema, skip
from megatron.config.errors import ConfigError
from megatron.config.foreign_variables import (
    FOREIGN_SPELLINGS,
    NOT_OURS,
    NOT_OURS_PREFIXES,
    WITHOUT_EFFECT,
)
from megatron.config.layout import crossing_warning
from megatron.config.reference_flags import (
    ALWAYS,
    ALWAYS_VALUED,
    ONLY,
    OUTSIDE,
    REFUSED,
    RENAMED,
    SHORTHANDS,
)
from megatron.config.schema import RunConfig
from megatron.config.unused import unused

CLOSE = 0.85  # one letter added, removed or changed in a word of seven
SHORTEST = 5  # shorter names resemble too much


class Stray(NamedTuple):
    """A variable that looks like an option and is none.

    Attributes:
        text: what holds.
        in_vain: the user meant an option by it: a job with it is refused.
    """

    name: str
    text: str
    in_vain: bool


def strays(environ: Mapping[str, str], ignored: str | None = None) -> list[Stray]:
    """Variables that are set, look like options and are none, by name.

    Args:
        environ: the environment's variables.
        ignored: IGNORE_VARIABLES, names that are meant for something else.
    """
    meant_otherwise = {*(ignored or "").replace(",", " ").split()}
    found = []
    for name in sorted(environ):
        ours = name in schema.by_variable() or name in NOT_OURS or name in meant_otherwise
        if not ours and environ[name].strip():
            stray = _stray(name, environ[name])
            found += [stray] if stray else []
    return found


def require_no_strays(found: Sequence[Stray]) -> None:
    """Refuse variables that were meant as options: nobody reads a job's warnings in time.

    Raises:
        ConfigError: where there are any.
    """
    vain = [stray for stray in found if stray.in_vain]
    if vain:
        names = ",".join(stray.name for stray in vain)
        lines = [stray.text for stray in vain]
        lines.append(f"A job with them is refused: unset them, or set IGNORE_VARIABLES={names}")
        raise ConfigError("\n".join(lines))


def _stray(name: str, value: str) -> Stray | None:
    """What holds for a variable that is none of ours; None for one that resembles none."""
    if name in WITHOUT_EFFECT:
        return Stray(name, f"{name} has no effect here: {WITHOUT_EFFECT[name]}", False)
    meant = FOREIGN_SPELLINGS.get(name) or _flag_spellings().get(name)
    reference = None if meant else _reference_spellings().get(name)
    if reference:
        return Stray(name, f"{name}={value} has no effect: {reference[0]}", reference[1])
    meant = meant or _closest(name)
    if not meant:
        return None
    kind = "flag" if meant.startswith("--") else "variable"
    return Stray(name, f"{name}={value} has no effect: the {kind} is called {meant}", True)


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
    if data.order == "stateless" and data.cache_path:
        warnings.append(
            f"DATA_CACHE_PATH={data.cache_path} has no effect with DATA_ORDER=stateless, "
            "which needs no cache"
        )
    return warnings + _unused_stability(run.stability) + unused(run)


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
    if run.checkpoint.no_load_rng:
        notes.append(
            "NO_LOAD_RNG leaves nothing out: a checkpoint holds no random state, since samples and "
            "weights follow from SEED and their number"
        )
    return notes


@functools.cache
def _flag_spellings() -> dict[str, str]:
    """Flags written as variables, e.g. HIDDEN_SIZE for --hidden-size, and what they are called."""
    others = {**SHORTHANDS, **RENAMED}
    shorthands = {flag: schema.by_key()[key] for flag, (key, _) in others.items()}
    return {
        _as_variable(flag): option.env[0] if option.env else flag
        for flag, option in (shorthands | schema.by_flag()).items()
    }


@functools.cache
def _reference_spellings() -> dict[str, tuple[str, bool]]:
    """The reference's flags written as variables: what holds, and whether that matters."""
    noted = {**ALWAYS, **ALWAYS_VALUED, **{flag: f"only {v[0]} works" for flag, v in ONLY.items()}}
    refused = {flag: f"{flag} is not offered: {what}" for flag, what in REFUSED.items()}
    outside = {flag: f"this is not for {flag}: {what}" for flag, what in OUTSIDE.items()}
    classes = ((noted, False), (outside, False), (refused, True))
    return {
        _as_variable(flag): (text, matters)
        for texts, matters in classes
        for flag, text in texts.items()
        if len(_as_variable(flag)) >= SHORTEST
    }


def _as_variable(flag: str) -> str:
    return flag[2:].replace("-", "_").upper()


def _closest(name: str) -> str | None:
    """The variable that `name` probably misspells, if any."""
    if len(name) < SHORTEST or not name.isupper() or name.startswith(NOT_OURS_PREFIXES):
        return None
    close = difflib.get_close_matches(name, schema.by_variable(), n=1, cutoff=CLOSE)
    return close[0] if close else None
