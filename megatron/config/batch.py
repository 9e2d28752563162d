"""Batch and length arithmetic.

GLOBAL_BATCH = MICRO_BATCH x GRAD_ACC_STEPS x DP; tokens = steps x GLOBAL_BATCH x SEQ, less while
the batch grows. What the user set must agree; the rest is derived from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.config.batch_sizes import BatchSizes, parse
from megatron.config.errors import ConfigError
from megatron.config.option import Draft, Setting

MICRO = "train.micro_batch_size"
ACCUMULATION = "train.gradient_accumulation_steps"
GLOBAL = "train.global_batch_size"
ITERS = "train.train_iters"
TOKENS = "train.train_tokens"
SAMPLES = "train.train_samples"
RAMPUP = "train.rampup_batch_size"

# What a run's length is given by -> the steps that follow from it.
LENGTHS = {
    ITERS: "",
    SAMPLES: "TRAIN_SAMPLES / GLOBAL_BATCH",
    TOKENS: "TRAIN_TOKENS / (GLOBAL_BATCH x SEQ)",
}

PRODUCTION_TOKENS = 4_673_780_159_710  # the AuroraGPT production run's first stage


def resolve_batch(draft: Draft, data_parallel: int) -> None:
    """Make the three batch sizes agree.

    Raises:
        ConfigError: the user's settings contradict each other; the message shows the arithmetic.
    """
    draft.fill(MICRO, 1, "default")
    draft.fill(ACCUMULATION, 1, "default")
    micro, accumulation, total = draft[MICRO], draft[ACCUMULATION], draft[GLOBAL]
    product = micro.value * accumulation.value * data_parallel
    if GLOBAL not in draft.given:
        draft.replace(GLOBAL, product, "MICRO_BATCH x GRAD_ACC_STEPS x DP")
        return
    samples, rest = divmod(total.value, data_parallel)  # of one data-parallel rank
    if rest:
        raise ConfigError(
            f"{total} is not a multiple of DP={data_parallel} (world size / (TP x PP x SP)): "
            f"{total.value} / {data_parallel} leaves {rest}. Set "
            f"{total.name}={_nearest_multiple(total.value, data_parallel)}"
        )
    if MICRO in draft.given and ACCUMULATION in draft.given:
        if product != total.value:
            raise ConfigError(
                f"{total}, but {micro} x {accumulation} x DP={data_parallel} = {product}. Unset "
                f"one of them, or set {total.name}={product}"
            )
    elif ACCUMULATION in draft.given:
        size = _quotient(total, accumulation, data_parallel)
        draft.replace(MICRO, size, "GLOBAL_BATCH / (GRAD_ACC_STEPS x DP)")
    else:
        if MICRO not in draft.given:
            usual = min(micro.value, samples)
            largest = next(size for size in range(usual, 0, -1) if samples % size == 0)
            if largest != micro.value:
                source = f"largest divisor of GLOBAL_BATCH / DP up to {micro.value}"
                draft.replace(MICRO, largest, source)
        steps = _quotient(total, draft[MICRO], data_parallel)
        draft.replace(ACCUMULATION, steps, "GLOBAL_BATCH / (MICRO_BATCH x DP)")


def _quotient(total: Setting, divisor: Setting, data_parallel: int) -> int:
    """GLOBAL_BATCH / (the other factor x DP), which must be whole."""
    step: int = divisor.value * data_parallel
    quotient, rest = divmod(total.value, step)
    if rest:
        raise ConfigError(
            f"{total} is not a multiple of {divisor} x DP={data_parallel} = {step}: {total.value} "
            f"/ {step} leaves {rest}. Set {total.name}={_nearest_multiple(total.value, step)} or "
            f"another {divisor.name}"
        )
    return int(quotient)


def _nearest_multiple(number: int, step: int) -> int:
    """The multiple of `step` closest to `number`, at least one."""
    return max(1, round(number / step)) * step


def sizes(draft: Draft) -> BatchSizes:
    """Samples of each step, as GLOBAL_BATCH and RAMPUP_BATCH_SIZE have them."""
    ramp = draft[RAMPUP]
    return parse(ramp.value, draft.get(GLOBAL), ramp.name)


def check_rampup(draft: Draft) -> Iterator[str]:
    """Each size of the ramp is made of whole micro-batches."""
    ramp, micro, total = draft[RAMPUP], draft[MICRO], draft[GLOBAL]
    if not ramp.value:
        return
    found, accumulation = sizes(draft), draft.get(ACCUMULATION)
    least = total.value // accumulation  # MICRO_BATCH x DP
    for name, size in (("START", found.start), ("INCREMENT", found.increment)):
        if size % least:
            ranks = least // micro.value
            common = math.gcd(found.start, found.increment, total.value)
            own = f"{micro.name}={common // ranks}, or " if common % ranks == 0 else ""
            yield (
                f"{ramp}: {name} {size} is not a multiple of {micro} x DP={ranks} = {least}: "
                f"{size} / {least} leaves {size % least}. Set {own}{name} "
                f"{_nearest_multiple(size, least)}"
            )
            return
    if draft.get("parallel.pipeline_schedule") == "dualpipev":
        stages, steps = draft["parallel.pipeline_parallel"], found.start // least
        if steps < 2 * stages.value:
            yield (
                f"{ramp}: START {found.start} is {steps} micro-batches per step, but dualpipev "
                f"needs 2 x {stages} = {2 * stages.value}. Set START "
                f"{2 * stages.value * least} or more"
            )


def resolve_train_iters(draft: Draft) -> None:
    """Make steps, samples and tokens of the run agree; what makes no whole step is dropped.

    Raises:
        ConfigError: where the user set two that differ, or what makes no step.
    """
    lengths = [key for key in LENGTHS if key in draft.given]
    if not lengths and draft.get(ITERS) is None:
        draft.fill(TOKENS, PRODUCTION_TOKENS, "default")
        lengths = [TOKENS]
    first, *others = lengths or [ITERS]
    steps, found = _steps(draft, first), sizes(draft)
    for key in others:
        other = draft[key]
        if _steps(draft, key) != steps:
            own = "" if first == ITERS else f" is {steps} steps"
            fitting = found.consumed(steps) * _unit(draft, key)
            raise ConfigError(
                f"{draft[first]}{own}, but {other} is {_steps(draft, key)} steps "
                f"({_arithmetic(draft, key)}). Unset one of them, or set {other.name}={fitting}"
            )
    ramp = ", RAMPUP_BATCH_SIZE" if found.samples else ""
    if first != ITERS:
        draft.replace(ITERS, steps, LENGTHS[first] + ramp)
    if TOKENS not in lengths:
        total = found.consumed(steps) * _unit(draft, TOKENS)
        draft.replace(TOKENS, total, "TRAIN_ITERS x GLOBAL_BATCH x SEQ" + ramp)


def _steps(draft: Draft, key: str) -> int:
    """Whole steps of a run's length, which is given by one of LENGTHS."""
    length: Setting = draft[key]
    if key == ITERS:
        return int(length.value)
    steps, unit = sizes(draft).steps(length.value // _unit(draft, key)), _unit(draft, key)
    if steps < 1:
        raise ConfigError(
            f"{length} is less than one step ({_arithmetic(draft, key)}). Set "
            f"{length.name}={sizes(draft).of(1) * unit} or more"
        )
    return steps


def _unit(draft: Draft, key: str) -> int:
    """What TRAIN_SAMPLES or TRAIN_TOKENS counts of a sample."""
    return int(draft.get("model.seq_length")) if key == TOKENS else 1


def _arithmetic(draft: Draft, key: str) -> str:
    found, unit = sizes(draft), _unit(draft, key)
    sample = f" x SEQ {unit} = {found.full * unit} tokens" if key == TOKENS else " samples"
    ramp = f", after RAMPUP_BATCH_SIZE {found}" if found.samples else ""
    return f"GLOBAL_BATCH {found.full}{sample} per step{ramp}"
