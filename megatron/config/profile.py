"""What PROFILE looks at: which steps, on which ranks."""

from __future__ import annotations

import re

from megatron.config.errors import ConfigError

USUAL = {"torch": (10, 12), "pyinstrument": (1, 100)}
"""Profiler -> first and last step. A trace holds every kernel and is made of few steps behind the
first ones; a call tree is made of samples and shows what the first ones cost as well."""


def steps(profiler: str, text: str | None, train_iters: int) -> tuple[int, int]:
    """First and last step that is profiled, 1-based, inclusive.

    Args:
        profiler: a name in USUAL.
        text: PROFILE_STEPS, `10 12`, `10-12`, `10,12` or one step; None: the usual ones, earlier
            in a run that is shorter.
        train_iters: the run's last step.

    Raises:
        ConfigError: the text is no such range, or lies behind the last step.
    """
    if text is None:
        first, last = USUAL[profiler]
        late = max(0, last - train_iters)
        return max(1, first - late), last - late
    words = re.split(r"[\s,-]+", text.strip())
    numbers = [int(word) for word in words if word.isdecimal()]
    if not len(words) == len(numbers) <= 2 or not 1 <= numbers[0] <= numbers[-1]:
        raise ConfigError(
            f"PROFILE_STEPS={text}: needs a first and a last step, counted from 1, such as `10 12`"
        )
    first, last = numbers[0], numbers[-1]
    if last > train_iters:
        raise ConfigError(
            f"PROFILE_STEPS={text} ends behind the run's last step, TRAIN_ITERS={train_iters}"
        )
    return first, last


def ranks(text: str, world_size: int) -> range | list[int]:
    """The ranks that are profiled.

    Raises:
        ConfigError: one is not a rank of the run.
    """
    if text == "all":
        return range(world_size)
    words = re.split(r"[\s,]+", text.strip())
    chosen = [int(word) for word in words if word.isdecimal() and int(word) < world_size]
    if len(chosen) < len(words):
        raise ConfigError(
            f"PROFILE_RANKS={text}: needs ranks of 0 to {world_size - 1}, such as `0 1`, or all"
        )
    return chosen
