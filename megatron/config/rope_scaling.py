"""ROPE_SCALING: the frequency scaling of Llama 3.1 and later."""

from __future__ import annotations

from typing import NamedTuple

from megatron.config.errors import ConfigError

LLAMA3_DEFAULT = "llama3:8,1,4,8192"  # Llama 3.1; Llama 3.2 has factor 32


class Llama3Scaling(NamedTuple):
    """Llama 3.1's scaling of the rotary frequencies, to read beyond the length trained on.

    Attributes:
        factor: low frequencies are divided by it.
        low_freq_factor: wavelengths above original_length / low_freq_factor are low frequencies.
        high_freq_factor: wavelengths below original_length / high_freq_factor stay as they are;
            between, a blend.
        original_length: tokens of the first training.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


def parse(text: str, name: str = "ROPE_SCALING") -> Llama3Scaling:
    """The factors that `llama3` or `llama3:factor,low,high,original_length` stands for.

    Raises:
        ConfigError: for another form, a factor below 1, or low >= high.
    """
    fix = f"write llama3 (that is {LLAMA3_DEFAULT}) or llama3:factor,low,high,original_length"
    kind, _, numbers = (LLAMA3_DEFAULT if text == "llama3" else text).partition(":")
    if kind != "llama3":
        raise ConfigError(f"{name}={text}: unknown scaling {kind!r}; {fix}")
    parts = numbers.split(",")
    try:
        factor, low, high = (float(part) for part in parts[:3])
        original_length = int(parts[3])
    except (ValueError, IndexError):
        raise ConfigError(f"{name}={text}: needs four numbers after llama3; {fix}") from None
    if (
        len(parts) != 4
        or not 1 <= factor < float("inf")
        or not 0 < low < high
        or original_length < 1
    ):
        raise ConfigError(
            f"{name}={text}: needs four numbers, factor >= 1, 0 < low < high, "
            f"original_length >= 1; {fix}"
        )
    return Llama3Scaling(factor, low, high, original_length)


def canonical(text: str, name: str = "ROPE_SCALING") -> str:
    """The one spelling kept in run.json."""
    scaling = parse(text, name)
    return (
        "llama3:"
        + ",".join(f"{number:g}" for number in scaling[:3])
        + f",{scaling.original_length}"
    )
