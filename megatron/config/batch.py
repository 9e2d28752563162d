"""Batch and length arithmetic.

GLOBAL_BATCH = MICRO_BATCH x GRAD_ACC_STEPS x DP; tokens = steps x GLOBAL_BATCH x SEQ.
What the user set must agree; the rest is derived from it.
"""

from __future__ import annotations

from megatron.config.errors import ConfigError
from megatron.config.option import Draft, Setting

MICRO = "train.micro_batch_size"
ACCUMULATION = "train.gradient_accumulation_steps"
GLOBAL = "train.global_batch_size"
ITERS = "train.train_iters"
TOKENS = "train.train_tokens"

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


def resolve_train_iters(draft: Draft) -> None:
    """Make steps and tokens of the run agree; tokens that make no whole step are dropped.

    Raises:
        ConfigError: where the user set both and they differ, or the tokens make no step.
    """
    batch, length, iters = draft.get(GLOBAL), draft.get("model.seq_length"), draft[ITERS]
    per_step = batch * length
    arithmetic = f"GLOBAL_BATCH {batch} x SEQ {length} = {per_step} tokens per step"
    if TOKENS not in draft.given and iters.value is not None:
        draft.replace(TOKENS, iters.value * per_step, "TRAIN_ITERS x GLOBAL_BATCH x SEQ")
        return
    draft.fill(TOKENS, PRODUCTION_TOKENS, "default")
    tokens = draft[TOKENS]
    steps = tokens.value // per_step
    if ITERS in draft.given:
        if steps != iters.value:
            raise ConfigError(
                f"{iters}, but {tokens} is {steps} steps ({arithmetic}). Unset one of them, or "
                f"set {tokens.name}={iters.value * per_step}"
            )
        return
    if steps < 1:
        raise ConfigError(
            f"{tokens} is less than one step ({arithmetic}). Set {tokens.name}={per_step} or more"
        )
    draft.replace(ITERS, steps, "TRAIN_TOKENS / (GLOBAL_BATCH x SEQ)")
