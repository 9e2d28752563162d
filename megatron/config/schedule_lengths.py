"""Warm-up and decay in steps, samples or tokens: whichever is set gives the schedule's two numbers.

LR_DECAY_ITERS is their length in steps, LR_WARMUP_FRAC the share of warm-up in it.
"""

from __future__ import annotations

from megatron.config import batch
from megatron.config.errors import ConfigError
from megatron.config.option import Draft, Setting

DECAY, FRACTION = "optimizer.lr_decay_iters", "optimizer.lr_warmup_fraction"
WARMUPS = tuple(f"optimizer.lr_warmup_{unit}" for unit in ("iters", "samples", "tokens"))
DECAYS = (DECAY, "optimizer.lr_decay_samples", "optimizer.lr_decay_tokens")


def resolve_schedule(draft: Draft) -> None:
    """Fill LR_DECAY_ITERS and LR_WARMUP_FRAC; the run's steps are known.

    Raises:
        ConfigError: one length is given twice, the decay makes no step, or the warm-up is not
            shorter than the decay.
    """
    decay = _only(draft, DECAYS)
    if decay is None or decay == DECAY:
        draft.fill(DECAY, draft.get(batch.ITERS), "TRAIN_ITERS")
    else:
        samples, source = _samples(draft, decay)
        steps = batch.sizes(draft).steps(int(samples))
        if steps < 1:
            raise ConfigError(
                f"{draft[decay]} is less than one step ({source} < "
                f"{batch.sizes(draft).of(1)} samples). Set a larger {draft[decay].name}"
            )
        draft.replace(DECAY, steps, f"{draft.options[decay].name}: whole steps")
    _resolve_warmup(draft)


def _resolve_warmup(draft: Draft) -> None:
    warmup = _only(draft, (FRACTION, *WARMUPS))
    if warmup is None or warmup == FRACTION:
        return
    end = draft[DECAY]
    samples, source = _samples(draft, warmup)
    whole = batch.sizes(draft).consumed(end.value)
    if samples >= whole:
        raise ConfigError(
            f"{draft[warmup]} is not shorter than the decay: {source}, {end} is {whole} samples. "
            f"Lower {draft[warmup].name}, or raise {end.name}"
        )
    name = draft.options[warmup].name
    draft.replace(FRACTION, samples / whole, f"{name} / {end.name}")


def _samples(draft: Draft, key: str) -> tuple[float, str]:
    """A length in samples, and the arithmetic; warm-up may end within a sample."""
    length: Setting = draft[key]
    if key.endswith("_iters"):
        samples: float = batch.sizes(draft).consumed(length.value)
        return samples, f"{length.value} steps are {samples} samples"
    if key.endswith("_tokens"):
        samples = length.value / draft.get("model.seq_length")
        return samples, f"{length.value} tokens / SEQ {draft.get('model.seq_length')} = {samples:g}"
    return length.value, f"{length.value} samples"


def _only(draft: Draft, keys: tuple[str, ...]) -> str | None:
    """The one of these options that the user set."""
    given = [key for key in keys if key in draft.given]
    if len(given) > 1:
        both = " and ".join(str(draft[key]) for key in given)
        raise ConfigError(f"{both} both set the same length. Unset one of them")
    return given[0] if given else None
