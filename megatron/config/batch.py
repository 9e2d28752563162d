"""Batch and length arithmetic.

GLOBAL_BATCH = MICRO_BATCH x GRAD_ACC_STEPS x DP; tokens = steps x GLOBAL_BATCH x SEQ.
What the user set must agree; the rest is derived from it.
"""

from __future__ import annotations

from megatron.config.errors import ConfigError
from megatron.config.option import Draft

MICRO = "train.micro_batch_size"
ACCUMULATION = "train.gradient_accumulation_steps"
GLOBAL = "train.global_batch_size"
ITERS = "train.train_iters"
TOKENS = "train.train_tokens"

PRODUCTION_TOKENS = 4_673_780_159_710  # the AuroraGPT production run's first stage


def resolve_batch(draft: Draft, data_parallel: int) -> None:
    """Make the three batch sizes agree.

    Raises:
        ConfigError: where what the user set contradicts itself; the message shows the arithmetic.
    """
    draft.fill(MICRO, 1, "default")
    draft.fill(ACCUMULATION, 1, "default")
    if GLOBAL not in draft.given:
        product = draft.get(MICRO) * draft.get(ACCUMULATION) * data_parallel
        draft.replace(GLOBAL, product, "MICRO_BATCH x GRAD_ACC_STEPS x DP")
        return
    total = draft.get(GLOBAL)
    if total % data_parallel:
        raise ConfigError(
            f"{draft.show(GLOBAL)} is not a multiple of DP={data_parallel} (world size / (TP x PP "
            f"x SP)): {total} / {data_parallel} leaves {total % data_parallel}. Set "
            f"{draft.name(GLOBAL)}={_nearest_multiple(total, data_parallel)}"
        )
    samples = total // data_parallel  # of one data-parallel rank
    if MICRO in draft.given and ACCUMULATION in draft.given:
        _require_product(draft, data_parallel)
    elif ACCUMULATION in draft.given:
        draft.replace(
            MICRO,
            _quotient(draft, ACCUMULATION, data_parallel),
            "GLOBAL_BATCH / (GRAD_ACC_STEPS x DP)",
        )
    else:
        if MICRO not in draft.given:
            usual = min(draft.get(MICRO), samples)
            largest = next(size for size in range(usual, 0, -1) if samples % size == 0)
            if largest != draft.get(MICRO):
                draft.replace(
                    MICRO, largest, f"largest divisor of GLOBAL_BATCH / DP up to {draft.get(MICRO)}"
                )
        draft.replace(
            ACCUMULATION,
            _quotient(draft, MICRO, data_parallel),
            "GLOBAL_BATCH / (MICRO_BATCH x DP)",
        )


def _require_product(draft: Draft, data_parallel: int) -> None:
    """Refuse three batch sizes that do not multiply up."""
    micro, accumulation, total = draft.get(MICRO), draft.get(ACCUMULATION), draft.get(GLOBAL)
    product = micro * accumulation * data_parallel
    if product != total:
        raise ConfigError(
            f"{draft.show(GLOBAL)}, but {draft.show(MICRO)} x {draft.show(ACCUMULATION)} x "
            f"DP={data_parallel} = {product}. Unset one of them, or set "
            f"{draft.name(GLOBAL)}={product}"
        )


def _quotient(draft: Draft, divisor_key: str, data_parallel: int) -> int:
    """GLOBAL_BATCH / (the other factor x DP), which must be whole."""
    total, divisor = draft.get(GLOBAL), draft.get(divisor_key)
    step: int = divisor * data_parallel
    if total % step:
        raise ConfigError(
            f"{draft.show(GLOBAL)} is not a multiple of {draft.show(divisor_key)} x "
            f"DP={data_parallel} = {step}: {total} / {step} leaves {total % step}. Set "
            f"{draft.name(GLOBAL)}={_nearest_multiple(total, step)} or another "
            f"{draft.name(divisor_key)}"
        )
    quotient: int = total // step
    return quotient


def _nearest_multiple(number: int, step: int) -> int:
    """The multiple of `step` closest to `number`, at least one."""
    return max(1, round(number / step)) * step


def resolve_train_iters(draft: Draft) -> None:
    """Make steps and tokens of the run agree; tokens that make no whole step are dropped.

    Raises:
        ConfigError: where the user set both and they differ, or the tokens make no step.
    """
    per_step = draft.get(GLOBAL) * draft.get("model.seq_length")
    factors = f"GLOBAL_BATCH {draft.get(GLOBAL)} x SEQ {draft.get('model.seq_length')}"
    arithmetic = f"{factors} = {per_step} tokens per step"
    if ITERS in draft.given and TOKENS in draft.given:
        steps = draft.get(TOKENS) // per_step
        if steps != draft.get(ITERS):
            raise ConfigError(
                f"{draft.show(ITERS)}, but {draft.show(TOKENS)} is {steps} steps ({arithmetic}). "
                f"Unset one of them, or set {draft.name(TOKENS)}={draft.get(ITERS) * per_step}"
            )
        return
    if TOKENS not in draft.given and draft.get(ITERS) is not None:
        draft.replace(TOKENS, draft.get(ITERS) * per_step, "TRAIN_ITERS x GLOBAL_BATCH x SEQ")
        return
    draft.fill(TOKENS, PRODUCTION_TOKENS, "default")
    steps = draft.get(TOKENS) // per_step
    if steps < 1:
        raise ConfigError(
            f"{draft.show(TOKENS)} is less than one step ({arithmetic}). Set "
            f"{draft.name(TOKENS)}={per_step} or more"
        )
    draft.replace(ITERS, steps, "TRAIN_TOKENS / (GLOBAL_BATCH x SEQ)")
